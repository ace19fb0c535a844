"""Passing a request on to an engine and its answer back, as it comes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from yarl import URL

from sage.common.errors import EngineError, SageError
from sage.llm.control_plane.routing import unresponsive
from sage.llm.control_plane.store.store import EngineRecord
from sage.llm.gateway.errors import out_of_descriptors
from sage.llm.gateway.relay import failure_event, relayed_events
from sage.llm.gateway.watch import IsResponsive, silence, while_responsive

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: An engine may think as long as it likes; one that cannot be reached is reported at once.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
#: What concerns one connection only (RFC 9110, section 7.6.1), and what the server or the client library writes anew.
_HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "content-length", "date", "server", "expect",
})  # fmt: skip
#: What is between the client and the gateway: its key, its cookies, where it comes from.
_OURS = frozenset({"authorization", "cookie", "host", "origin", "referer", "accept-encoding"})
#: Nothing is compressed on the way from an engine of this machine.
_PLAIN = ("Accept-Encoding", "identity")


class EngineProxy:
    """Connections to all engines, one per request: none is kept that the engine might close as the next request comes."""

    def __init__(self, is_responsive: IsResponsive) -> None:
        """is_responsive: whether the engine of an id answers its health checks; one that does not is given up."""
        self._session = aiohttp.ClientSession(
            timeout=_TIMEOUT,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._is_responsive = is_responsive

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def forward(self, engine: EngineRecord, request: Request, body: bytes) -> Response:
        """Return the engine's answer, streamed if it streams.

        If the client disconnects first, the upstream request is cancelled.
        Raises EngineError if the engine dies, Overloaded if it hangs, ClientDisconnect.
        """
        try:
            upstream = await self._first(request, engine, self._ask(engine, request, body))
            if upstream.content_type == "text/event-stream":
                return _Stream(engine, upstream, self._is_responsive, request.headers["x-request-id"])
            try:
                content = await self._first(request, engine, upstream.read())
            finally:
                upstream.close()
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(engine, error) from error
        answer = Response(content, upstream.status)
        answer.raw_headers = [*_answer_headers(upstream), (b"content-length", str(len(content)).encode())]
        return answer

    async def _first(self, request: Request, engine: EngineRecord, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`; raises ClientDisconnect if the client leaves, Overloaded if the engine hangs."""
        working = asyncio.ensure_future(work)
        others = [asyncio.ensure_future(each) for each in (_left(request), silence(engine.id, self._is_responsive))]
        try:
            done, _ = await asyncio.wait([working, *others], return_when=asyncio.FIRST_COMPLETED)
            if working not in done:
                next(iter(done)).result()  # raises
            return await working
        finally:
            for task in (working, *others):
                task.cancel()
            await asyncio.gather(working, *others, return_exceptions=True)

    async def _ask(self, engine: EngineRecord, request: Request, body: bytes) -> aiohttp.ClientResponse:
        query = f"?{request.url.query}" if request.url.query else ""
        return await self._session.post(
            URL(f"http://127.0.0.1:{engine.port}{request.url.path}{query}", encoded=True),
            data=body,
            headers=[*_request_headers(request), _PLAIN],
            skip_auto_headers=("User-Agent",),
            allow_redirects=False,
        )


class _Stream(StreamingResponse):
    """A streamed answer; its connection to the engine is closed however it ends, which ends the engine's work on it."""

    def __init__(
        self, engine: EngineRecord, upstream: aiohttp.ClientResponse, is_responsive: IsResponsive, request_id: str
    ) -> None:
        super().__init__(self._pieces(engine, is_responsive, request_id), upstream.status)
        self.raw_headers = list(_answer_headers(upstream))
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._upstream.close()

    async def _pieces(self, engine: EngineRecord, is_responsive: IsResponsive, request_id: str) -> AsyncIterator[bytes]:
        pieces = while_responsive(engine.id, is_responsive, self._upstream.content.iter_any())
        try:
            async for piece in relayed_events(pieces):
                yield piece
            return
        except (aiohttp.ClientError, OSError, EOFError) as error:
            failure = _failure(engine, error)
        except SageError as error:
            failure = error
        logger.warning("%s: %s", request_id, failure.message)
        yield failure_event(failure)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


def _request_headers(request: Request) -> Iterable[tuple[str, str]]:
    named = {name.strip().lower() for value in request.headers.getlist("connection") for name in value.split(",")}
    for raw_name, raw_value in request.headers.raw:
        name = raw_name.decode("latin-1").lower()
        if name not in _HOP_BY_HOP | _OURS | named:
            yield name, _text(raw_value)


def _answer_headers(upstream: aiohttp.ClientResponse) -> Iterable[tuple[bytes, bytes]]:
    named = {name.strip().lower() for value in upstream.headers.getall("Connection", []) for name in value.split(",")}
    for name, value in upstream.raw_headers:
        if name.decode("latin-1").lower() not in _HOP_BY_HOP | named:
            yield name.lower(), value


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _failure(engine: EngineRecord, error: Exception) -> SageError:
    if isinstance(error, TimeoutError):  # it did not even take the connection
        return unresponsive(engine.id)
    return out_of_descriptors(error) or _died(engine)


def _died(engine: EngineRecord) -> EngineError:
    return EngineError(
        code="engine_died",
        message=f"{engine.id} ('{engine.name}') ended before its answer was complete.",
        hint=f"`sage llm engine status {engine.id}` says why.",
    )
