"""One request of a client, and the answer.

The ASGI functions `receive` and `send` make fewer function calls than uvicorn's `receive` and `send`.
"""

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.headers import RawHeaders

logger = logging.getLogger(__name__)
#: If a request's body is incomplete and no data arrives for this many seconds, the request is rejected with status 408.
_SILENCE_SECONDS = 60
#: Maximum number of received bytes that the application has not read yet; above this number, the client is paused.
_WAITING_BYTES = 256 * 1024


class RequestCycle:
    """A request and its answer. The public attributes have the names that uvicorn's protocol uses."""

    def __init__(
        self, scope: Scope, transport: asyncio.Transport, flow: FlowControl, default_headers: RawHeaders,
        on_response: Callable[[], None], *, keep_alive: bool, waits_for_100_continue: bool,
    ) -> None:  # fmt: skip
        """default_headers: headers to add to the answer.  on_response: function that is called when the answer is complete.

        keep_alive: whether the connection stays open after the answer.
        """
        self._on_response, self._waits_for_100_continue = on_response, waits_for_100_continue
        self._scope, self._transport, self._flow, self._default_headers = scope, transport, flow, default_headers
        self.keep_alive = keep_alive
        self.message_event = asyncio.Event()  #: set if a part of the request has arrived or the request has ended
        self.more_body = True  #: whether the request's body is incomplete
        self.disconnected = self.response_complete = False
        self._chunks: list[bytes] = []
        self._chunks_bytes = 0
        self._has_begun = self._is_chunked = False
        self._held_head = b""
        self._left_bytes = 0  #: number of body bytes still to send, if the answer's length is known

    async def run_asgi(self, app: ASGIApp) -> None:
        """Let the application answer the request. If the answer is then incomplete, close the connection."""
        try:
            await app(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            logger.info("the request to %s was interrupted, because the gateway stops", self._scope["path"][:200])
        except BaseException:  # no other code logs the failure
            logger.exception("the request to %s failed", self._scope["path"][:200])
        if not self.response_complete and not self.disconnected:
            self._transport.close()

    def add_body(self, content: bytes) -> None:
        """Store a part of the request's body. Pause the client if the application reads too slowly."""
        self._chunks.append(content)
        self._chunks_bytes += len(content)
        if self._chunks_bytes > _WAITING_BYTES:
            self._flow.pause_reading()
        self.message_event.set()

    async def receive(self) -> Message:
        """Return the next part of the request. Raises Refusal if the body is incomplete and no more data arrives."""
        if self._waits_for_100_continue and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waits_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self._flow.resume_reading()
            if not self.message_event.is_set():
                await self._wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = b"".join(self._chunks)
        self._chunks.clear()
        self._chunks_bytes = 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """Send a part of the answer; wait while the client reads too slowly."""
        if self._flow.write_paused and not self.disconnected:
            await self._flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
        else:
            self._write(message.get("body", b""), message.get("more_body", False))

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS if self.more_body else None):
                await self.message_event.wait()
        except TimeoutError as error:
            message = f"No byte of the body arrived for {_SILENCE_SECONDS} s."
            raise Refusal(408, "request_timeout", message) from error

    def _begin(self, status: int, headers: RawHeaders) -> None:
        """If the answer is chunked, write its head. Otherwise keep the head, and write it with the first part of the body.

        One write instead of two saves a system call and a wake-up of the client. Together, they take up to 20 % of a
        request's time.
        """
        assert not self._has_begun
        self._has_begun, self._waits_for_100_continue = True, False
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % header for header in (*self._default_headers, *headers)]
        known = dict(headers)
        if b"content-length" in known:
            self._left_bytes = int(known[b"content-length"])
        else:
            self._is_chunked = status not in (204, 304) and self._scope["method"] != "HEAD"
        if b"close" in known.get(b"connection", b"").lower():
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise ValueError("A header of the answer has a line break or a null byte.")
        if self._is_chunked:
            self._transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
        else:
            self._held_head = head + b"\r\n"

    def _write(self, body: bytes, more_body: bool) -> None:
        assert self._has_begun
        assert not self.response_complete
        if self._scope["method"] == "HEAD":
            body, self._left_bytes = b"", 0
        if self._is_chunked:
            end = b"" if more_body else b"0\r\n\r\n"
            self._transport.write(b"%x\r\n%b\r\n%b" % (len(body), body, end) if body else end)
        else:
            self._left_bytes -= len(body)
            if self._left_bytes < 0 or (self._left_bytes and not more_body):
                raise ValueError("The length of the answer differs from its Content-Length header.")
            self._transport.write(self._held_head + body)
            self._held_head = b""
        if not more_body:
            self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self._transport.close()
        self._on_response()
