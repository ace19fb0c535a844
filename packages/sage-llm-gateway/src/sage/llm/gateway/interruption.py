"""Stop waiting for an engine if the client disconnects or the engine does not respond."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sage.llm.control_plane.routing import unresponsive

#: Seconds from the start of a request to the first check. Shorter requests are not checked, to save time.
_FIRST_SECONDS = 0.05
_CHECK_SECONDS = 0.5


class Interruption:
    """A context manager that cancels its block if the client disconnects or the engine does not respond.

    After the cancellation, the end of the block raises ClientDisconnect, or Overloaded if the engine `engine_id` does not
    respond. Read the request's body before the block, because messages that arrive during the block are discarded.
    """

    def __init__(self, receive: Receive, is_responsive: Callable[[str], bool]) -> None:
        """is_responsive: function that takes an engine's id and returns whether the engine answers health checks."""
        self._receive, self._is_responsive = receive, is_responsive
        self.engine_id: str | None = None
        self._reason: Exception | None = None
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start watching the client and the engine."""
        task = asyncio.current_task()
        assert task
        self._task, self._loop = task, asyncio.get_running_loop()
        self._timer = self._loop.call_later(_FIRST_SECONDS, self._check)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching. If `_interrupt` cancelled the block, raise the reason."""
        self._timer.cancel()
        if self._listening:
            self._listening.cancel()
        if self._reason and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise self._reason from error

    def _check(self) -> None:
        if self._listening is None:
            self._listening = self._loop.create_task(self._listen())
        if self.engine_id and not self._is_responsive(self.engine_id):
            self._interrupt(unresponsive(self.engine_id))
        else:
            self._timer = self._loop.call_later(_CHECK_SECONDS, self._check)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt(ClientDisconnect())

    def _interrupt(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()
