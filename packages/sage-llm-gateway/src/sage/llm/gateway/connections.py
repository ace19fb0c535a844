"""Add limits to uvicorn's HTTP protocol.

The limits are the number of client connections, the size of a request's head (request line and headers), and the time in
which a complete head must arrive.
"""

import asyncio
import json
import math
import resource
from http import HTTPStatus
from typing import ClassVar
from urllib.parse import unquote

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sage.common.errors import RETRY_AFTER_SECONDS, Overloaded, SageError
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.request_cycle import RequestCycle

_MOST_DESCRIPTORS = 65_536
#: File descriptors reserved for the database, logs, locks, devices, listening sockets, and processes being started.
_RESERVED_DESCRIPTORS = 56
_HEAD_BYTES = 65_536
_HEAD_SECONDS = 30
#: Idle client connections are closed after this many seconds. HTTP clients close idle connections earlier (httpx: 5 s,
#: aiohttp: 15 s), so a client does not send a request on a connection that the gateway has just closed.
_KEEP_ALIVE_SECONDS = 30
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

    If the client exceeds a limit, the connection is closed, in most cases after an error in OpenAI's format.
    """

    limit: ClassVar[int] = 1000  #: maximum number of connections

    cycle: RequestCycle  # type: ignore[assignment]
    scope: Scope  # type: ignore[assignment]
    _is_refused = False
    _reason: Refusal | None = None
    _head_bytes = 0  #: number of bytes that were received since the head began; may include bytes of the previous body
    _head_is_open = True
    #: Time of the event loop's clock at which the connection is closed, unless a complete head arrives before that time.
    #: Infinite during a request.
    _deadline_seconds = math.inf
    #: The connection has one timer for all its requests, because a new timer for each request would cost 3 µs.
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or reject it if there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.limit + _SPARE_CONNECTIONS:
            transport.abort()
        elif len(self.connections) > self.limit:
            message = f"The gateway already has {self.limit} connections, which is the limit."
            self._refuse(Overloaded(code="too_many_connections", message=message, hint="Retry in some seconds."))
        else:
            self._deadline_seconds = self.loop.time() + _HEAD_SECONDS
            self._check_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and limit the size of a request's head."""
        if self.transport.is_closing() or self._is_refused:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._head_is_open:
            self._head_bytes = 0
        elif self._head_bytes > _HEAD_BYTES and not self._is_refused:
            self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        """Record that the head of a request begins."""
        super().on_message_begin()
        self._head_is_open, self._deadline_seconds = True, self.loop.time() + _HEAD_SECONDS

    def on_headers_complete(self) -> None:
        """Start the request, because its head is complete. Raises Refusal if the head is too large."""
        if self._head_bytes > _HEAD_BYTES and self._is_head_too_large():
            self._reason = _head_too_large()
            raise self._reason  # the parser then calls send_400_response
        self._head_is_open, self._deadline_seconds = False, math.inf
        self._set_scope()
        previous, self.cycle = self.cycle, self._new_cycle()
        if previous is None or previous.response_complete:
            self._start_asgi_task(self.cycle, self.app)  # type: ignore[arg-type]
        else:  # a pipelined request, which starts when the answer to the previous request is complete
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        """Store a part of the request's body, unless the answer is complete already."""
        if not self.cycle.response_complete:
            self.cycle.add_body(body)

    def on_response_complete(self) -> None:
        """Start the next request if it has arrived; otherwise set the time at which the idle connection is closed."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.flow.resume_reading()
            if not self._head_is_open:
                self._deadline_seconds = self.loop.time() + _KEEP_ALIVE_SECONDS

    def _check_deadline(self) -> None:
        """Close the connection if its deadline has passed. Otherwise check again at the deadline, or earlier."""
        now_seconds = self.loop.time()
        if now_seconds >= self._deadline_seconds:
            self.transport.close()
        else:
            # A deadline that is set after this line is never earlier than the next check, so no deadline is missed.
            self._timer = self.loop.call_at(min(self._deadline_seconds, now_seconds + _HEAD_SECONDS), self._check_deadline)

    def _is_head_too_large(self) -> bool:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES

    def _set_scope(self) -> None:
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        self.scope.update({
            "method": self.parser.get_method().decode("ascii"),
            "http_version": self.parser.get_http_version(),
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
        })  # fmt: skip

    def _new_cycle(self) -> RequestCycle:
        keep_alive = self.scope["http_version"] != "1.0" and self.parser.should_keep_alive()
        return RequestCycle(
            self.scope, self.transport, self.flow, self.server_state.default_headers, self.on_response_complete,
            keep_alive=keep_alive, waits_for_100_continue=self.expect_100_continue,
        )  # fmt: skip

    def send_400_response(self, msg: str) -> None:
        """Reject a request that is not valid HTTP or has a head that is too large."""
        self._refuse(self._reason or Refusal(400, "invalid_http", msg))

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
