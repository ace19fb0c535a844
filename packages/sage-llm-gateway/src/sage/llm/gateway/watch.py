"""Noticing an engine that hangs: it neither sends anything nor answers when it is asked for its health."""

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp

from sage.common.errors import Overloaded
from sage.llm.control_plane.store.store import EngineRecord

_PROBE_SECONDS = 5.0


class EngineWatch:
    """Asks engines for their health while requests wait for them; all requests of one engine share the asking."""

    def __init__(self, session: aiohttp.ClientSession, unresponsive_seconds: float) -> None:
        self._session, self._unresponsive_seconds = session, unresponsive_seconds
        self._interval_seconds = min(_PROBE_SECONDS, unresponsive_seconds)
        self._probes: dict[str, asyncio.Task[bool]] = {}

    async def silence(self, engine: EngineRecord) -> None:
        """Wait until an engine hangs, and raise Overloaded then; returns never."""
        interval = self._interval_seconds
        silent_since = time.monotonic()
        while True:
            asked_at = time.monotonic()
            await asyncio.sleep(interval)
            if await self._is_healthy(engine):
                silent_since = time.monotonic()
            # The gateway may have been stopped itself: only what it watched counts.
            silent_since += max(0.0, time.monotonic() - asked_at - 3 * interval)
            if time.monotonic() - silent_since > self._unresponsive_seconds:
                raise self.unresponsive(engine)

    async def while_alive(self, engine: EngineRecord, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield what comes; raises Overloaded if nothing comes any more because the engine hangs."""
        iterator = aiter(pieces)
        while True:
            piece = asyncio.ensure_future(anext(iterator, None))
            silence: asyncio.Task[None] | None = None
            try:
                if not (await asyncio.wait({piece}, timeout=self._interval_seconds))[0]:
                    silence = asyncio.ensure_future(self.silence(engine))
                    await asyncio.wait({piece, silence}, return_when=asyncio.FIRST_COMPLETED)
                    if not piece.done():
                        silence.result()
                content = await piece
            finally:
                piece.cancel()
                if silence:
                    silence.cancel()
            if content is None:
                return
            yield content

    def unresponsive(self, engine: EngineRecord) -> Overloaded:
        """Return the error for an engine that hangs."""
        return Overloaded(
            code="engine_unresponsive",
            message=f"{engine.id} ('{engine.name}') does not answer, nor when it is asked for its health.",
            hint=f"If it does not recover: `sage llm engine stop --force {engine.id}`.",
        )

    async def _is_healthy(self, engine: EngineRecord) -> bool:
        probe = self._probes.get(engine.id)
        if probe is None or probe.done():
            probe = asyncio.ensure_future(self._probe(engine))
            self._probes[engine.id] = probe
            probe.add_done_callback(lambda _: self._probes.pop(engine.id, None))
        return await asyncio.shield(probe)

    async def _probe(self, engine: EngineRecord) -> bool:
        timeout = aiohttp.ClientTimeout(total=self._interval_seconds)
        try:
            async with self._session.get(f"http://127.0.0.1:{engine.port}/health", timeout=timeout) as answer:
                return answer.status == 200
        except aiohttp.ClientConnectorError:
            return True  # it is gone, or we have no descriptor left: the request itself finds out
        except (aiohttp.ClientError, TimeoutError):
            return False
