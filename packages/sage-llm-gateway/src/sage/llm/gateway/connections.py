"""Add limits that uvicorn does not have: the number of client connections, and the size and duration of a request's head."""

import asyncio
import json
import resource
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sage.common.errors import RETRY_AFTER_SECONDS, Overloaded, SageError
from sage.llm.gateway.errors import Refusal

_MOST_DESCRIPTORS = 65_536
#: File descriptors reserved for the database, logs, locks, devices, listening sockets, and processes being started.
_RESERVED_DESCRIPTORS = 56
_HEAD_BYTES = 65_536
_HEAD_SECONDS = 30
_LINGER_SECONDS = 2
#: Number of connections above the limit that are answered with status 503; further connections are closed without an answer.
_SPARE_CONNECTIONS = 8


def connection_limit() -> int:
    """Raise this process's limit of file descriptors to the maximum, and return how many clients the limit allows.

    A request uses two descriptors: one for the client's connection, and one for the connection to the engine.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return max(4, (min(soft, _MOST_DESCRIPTORS) - _RESERVED_DESCRIPTORS) // 2)


class BoundedHttp(HttpToolsProtocol):
    """The HTTP/1.1 protocol of one client connection.

    If the client exceeds a limit, it gets an error in OpenAI's format and is disconnected.
    """

    limit: ClassVar[int] = 1000  #: maximum number of connections

    _is_refused = False
    _reason: Refusal | None = None
    _head_bytes = 0
    _head_is_open = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or reject it if there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limit + _SPARE_CONNECTIONS:
            transport.abort()
        elif len(self.connections) > self.limit:
            message = f"The gateway already has {self.limit} connections, which is the limit."
            self._refuse(Overloaded(code="too_many_connections", message=message, hint="Retry in some seconds."))
        else:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer of the request's head, because the connection has ended."""
        self._close_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and limit the size and duration of a request's head."""
        if self.transport.is_closing() or self._is_refused:
            return
        super().data_received(data)
        if self._head_is_open and not self._is_refused:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse(_head_too_large())
            elif self._head_timer is None:
                self._time_head()

    def on_message_begin(self) -> None:
        """Record that the head of a request begins."""
        super().on_message_begin()
        self._head_is_open = True

    def on_headers_complete(self) -> None:
        """Record that the head of a request is complete. Raises Refusal if the head is too large."""
        self._close_head()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES:
            self._reason = _head_too_large()
            raise self._reason  # the parser then calls send_400_response
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Reject a request that is not valid HTTP or has a head that is too large."""
        self._refuse(self._reason or Refusal(400, "invalid_http", msg))

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _close_head(self) -> None:
        self._head_is_open, self._head_bytes = False, 0
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: SageError) -> None:
        status = HTTPStatus(error.http_status)
        body = json.dumps(error.body()).encode()
        head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        if isinstance(error, Overloaded):
            head += f"retry-after: {RETRY_AFTER_SECONDS}\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        # Close the connection only after some seconds. Closing a connection with unread data of the client resets the
        # connection, and then the client can lose the answer.
        self.transport.write_eof()
        self._is_refused = True
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _head_too_large() -> Refusal:
    return Refusal(431, "headers_too_large", f"The request's headers are larger than {_HEAD_BYTES // 1024} KiB.")
