"""Stop waiting for an engine if the client disconnects or the engine does not respond."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sage.llm.control_plane.routing import unresponsive

#: Time between two checks of a request. A request that ends before its first check costs almost nothing.
_CHECK_SECONDS = 0.1


class Watch:
    """Checks the requests in progress with one timer; a timer for each request would cost 4 µs per request."""

    def __init__(self) -> None:
        self._requests: set[Interruption] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: "Interruption") -> None:
        """Check a request until it is removed."""
        self._requests.add(request)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._check)

    def remove(self, request: "Interruption") -> None:
        """Stop checking a request."""
        self._requests.discard(request)

    def _check(self) -> None:
        for request in list(self._requests):
            request.check()
        self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._check) if self._requests else None


class Interruption:
    """A context manager that cancels its block if the client disconnects or the engine does not respond.

    After the cancellation, the end of the block raises ClientDisconnect, or Overloaded if the engine `engine_id` does not
    respond. Read the request's body before the block: during the block, further parts of the body are discarded.
    """

    _reason: Exception | None = None
    _listening: asyncio.Task[None] | None = None

    def __init__(self, watch: Watch, receive: Receive, is_responsive: Callable[[str], bool]) -> None:
        """is_responsive: function that takes an engine's id and returns whether the engine answers health checks."""
        self._watch, self._receive, self._is_responsive = watch, receive, is_responsive
        self.engine_id: str | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task
        self._task = task
        self._watch.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch.remove(self)
        if self._listening:
            self._listening.cancel()
        if self._reason and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise self._reason from error

    def check(self) -> None:
        """Interrupt the block if the engine does not respond. The first call also starts to listen for a disconnection."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        if self.engine_id and not self._is_responsive(self.engine_id):
            self._interrupt(unresponsive(self.engine_id))

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._interrupt(ClientDisconnect())

    def _interrupt(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()
