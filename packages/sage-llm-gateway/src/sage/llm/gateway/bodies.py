"""Read request bodies, and limit the size of each body and of all bodies together."""

from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sage.common.errors import Overloaded
from sage.llm.gateway.errors import Refusal

#: Maximum total size of the bodies in memory, as a multiple of the maximum size of one body.
_HELD_BODIES = 8


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
    """The body of one request. The memory of the body is taken from the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held_bytes = budget, 0
        self.content = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._budget.left_bytes += self._held_bytes
        self._held_bytes = 0

    async def read(self, length: bytes, receive: Receive) -> None:
        """Read the whole body into `content`.

        length: value of the header Content-Length, or b"".

        Raises Refusal if the body is too large, Overloaded if the budget has too little memory left, and
        ClientDisconnect if the client disconnects.
        """
        if length.isdigit() and int(length) > self._budget.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self._hold(len(chunk))
            chunks.append(chunk)
        self.content = b"".join(chunks)

    def _hold(self, count_bytes: int) -> None:
        if self._held_bytes + count_bytes > self._budget.max_bytes:
            raise self._too_large()
        if count_bytes > self._budget.left_bytes:
            raise Overloaded(code="too_many_requests", message="The gateway's memory for request bodies is full.",
                             hint="Retry in some seconds.")  # fmt: skip
        self._held_bytes += count_bytes
        self._budget.left_bytes -= count_bytes

    def _too_large(self) -> Refusal:
        limit_mb = self._budget.max_bytes // 1_000_000
        return Refusal(413, "request_too_large", f"The request body is larger than {limit_mb} MB.",
                       "Send a smaller body, or raise the setting max_request_mb.")  # fmt: skip
