"""Read request bodies, and limit the size of each body and of all bodies together."""

import asyncio
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sage.common.errors import Overloaded
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.headers import RawHeaders, value

#: Maximum size of all bodies in memory, as a multiple of the largest allowed body.
_HELD_BODIES = 8
#: Seconds without data after which a request fails with status 408.
_SILENCE_SECONDS = 60


class BodyBudget:
    """The memory for request bodies, shared by all requests."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: size of the largest allowed body."""
        self.max_bytes = max_bytes
        self.left_bytes = _HELD_BODIES * max_bytes

    def body(self) -> "Body":
        """Return an empty body, to be used in a `with` block. The end of the block releases the body's memory."""
        return Body(self)


class Body:
    """The body of one request; its bytes are taken from the shared budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held_bytes = budget, 0
        self.content = b""

    def __enter__(self) -> Self:
        """Return the empty body."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Return the body's bytes to the budget."""
        self._budget.left_bytes += self._held_bytes
        self._held_bytes = 0

    async def read(self, headers: RawHeaders, receive: Receive) -> None:
        """Read the whole body into `content`.

        Raises Refusal if the body is too large or arrives too slowly, Overloaded if the budget is used up, and
        ClientDisconnect if the client disconnects.
        """
        length = value(headers, b"content-length")
        if length.isdigit() and int(length) > self._budget.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_SILENCE_SECONDS) as silence:
                while await self._read_chunk(chunks, receive):
                    silence.reschedule(loop.time() + _SILENCE_SECONDS)
        except TimeoutError as error:
            raise Refusal(408, "request_timeout", f"No byte of the body arrived for {_SILENCE_SECONDS} s.") from error
        self.content = b"".join(chunks)

    async def _read_chunk(self, chunks: list[bytes], receive: Receive) -> bool:
        """Receive a chunk and append it to `chunks`; return whether more chunks follow."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        self._hold(len(chunks[-1]))
        more: bool = message.get("more_body", False)
        return more

    def _hold(self, count_bytes: int) -> None:
        if self._held_bytes + count_bytes > self._budget.max_bytes:
            raise self._too_large()
        if count_bytes > self._budget.left_bytes:
            raise Overloaded(code="too_many_requests", message="Other requests use all memory for request bodies.",
                             hint="Retry in some seconds.")  # fmt: skip
        self._held_bytes += count_bytes
        self._budget.left_bytes -= count_bytes

    def _too_large(self) -> Refusal:
        limit_mb = self._budget.max_bytes // 1_000_000
        return Refusal(413, "request_too_large", f"The body is larger than {limit_mb} MB.",
                       "Send less, or raise the setting max_request_mb.")  # fmt: skip
