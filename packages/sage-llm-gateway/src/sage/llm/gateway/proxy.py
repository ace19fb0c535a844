"""Passing a request on to an engine and its answer back, as it comes."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sage.common.errors import EngineError
from sage.llm.control_plane.store.store import EngineRecord

#: An engine may think as long as it likes; one that cannot be reached is told at once.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
#: How often it is looked whether anybody still waits for an answer.
_HANG_UP_SECONDS = 0.5


class EngineProxy:
    """One pool of connections to all engines."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def forward(self, engine: EngineRecord, request: Request, body: bytes) -> Response:
        """Return the engine's answer, streamed where it streams; raises EngineError where there is none.

        Who hangs up before the answer is there has the engine's work on it ended.
        """
        answer = asyncio.ensure_future(self._answer(engine, request.url.path, body))
        try:
            while not (await asyncio.wait({answer}, timeout=_HANG_UP_SECONDS))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
            return await answer
        except aiohttp.ClientError as error:
            raise _lost(engine, error) from error
        finally:
            answer.cancel()

    async def _answer(self, engine: EngineRecord, path: str, body: bytes) -> Response:
        upstream = await self._session.post(
            f"http://127.0.0.1:{engine.port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        if upstream.content_type == "text/event-stream":
            return StreamingResponse(_chunks(upstream), upstream.status, media_type="text/event-stream")
        async with upstream:
            content = await upstream.read()
        return Response(content, upstream.status, media_type=upstream.content_type)


async def _chunks(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    # Leaving the block closes the connection, which tells the engine that nobody listens any more.
    async with upstream:
        async for chunk in upstream.content.iter_any():
            yield chunk


def _lost(engine: EngineRecord, error: Exception) -> EngineError:
    return EngineError(
        code="engine_lost",
        message=f"{engine.id} stopped answering ({type(error).__name__}).",
        hint=f"`sage llm engine status {engine.id}` says why.",
    )
