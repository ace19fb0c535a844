"""A small HTTP/1.1 client for the servers of engines, with reused connections."""

import asyncio
import errno
import math
from collections.abc import Callable, Sequence

import httptools

from sage.llm.gateway.json_text import Piece

#: A connection that was idle for this number of seconds is not reused.
#: Servers keep idle connections longer (uvicorn and vLLM: 5 s).
_IDLE_SECONDS = 3
_CONNECT_SECONDS = 5
#: Bodies below this size are joined with the head, because one `write` is faster than `writelines` for small bodies.
_SMALL_BYTES = 16 * 1024
#: Maximum number of received bytes that wait to be returned by `piece`. Above this number, reading is paused.
_WAITING_BYTES = 256 * 1024


class EngineConnection(asyncio.Protocol):
    """A connection to a server, for one request and its answer at a time."""

    transport: asyncio.Transport

    def __init__(self, address: str, forget: Callable[["EngineConnection"], None]) -> None:
        """forget: function that is called when the connection ends."""
        self.address, self._forget = address, forget
        self.loop, self._parser = asyncio.get_running_loop(), httptools.HttpResponseParser(self)
        self.idle_since_seconds = 0.0
        self._is_busy = False
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_begun = False  #: whether a byte of the answer has arrived
        self._has_head = self._is_complete = self._is_reusable = self._ends_at_eof = self._is_paused = False
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def send(self, head: bytes, body: Sequence[Piece]) -> None:
        """Send a request, and wait for the head of its answer. Raises ConnectionError."""
        self._begin()
        self._is_busy = True
        if sum(map(len, body)) < _SMALL_BYTES:
            self.transport.write(b"".join([head, *body]))
        else:
            self.transport.writelines([head, *body])
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Return the rest of the body. Raises ConnectionError."""
        content = await self.piece()
        if self._is_complete and not self._pieces:
            return content
        pieces = [content]
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def piece(self) -> bytes:
        """Wait for the next part of the body and return it. At the end of the body, return b"". Raises ConnectionError."""
        while not self._pieces and not self._is_complete:
            await self._wait()
        content = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()
        return content

    def end(self) -> bool:
        """End the request, and close a connection that cannot be reused. Return whether the connection can be reused."""
        self._is_busy = False
        if self._is_complete and self._is_reusable and not self.transport.is_closing():
            return True
        self.transport.abort()
        return False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store the transport of the new connection."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse received bytes of an answer."""
        if not self._is_busy:  # the server sends data although there is no request
            self.transport.abort()
            return
        self.has_begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"The server's answer is not valid HTTP: {error}."))
        if self._waiting_bytes > _WAITING_BYTES and not self._is_complete:
            self._is_paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Call `forget`, and end the request in progress.

        An answer without a length is complete if the connection ended without an error. A request with an incomplete answer
        fails.
        """
        self._forget(self)
        if self._ends_at_eof and exc is None:
            self._is_complete = True
        elif not self._is_complete:
            self._fail(ConnectionResetError("The server closed the connection before the answer was complete."))
        self._wake()

    def on_message_begin(self) -> None:
        """Raise ConnectionError if the server sends a second answer. The parser converts this error to HttpParserError."""
        if self._is_complete:
            raise ConnectionError

    def on_header(self, name: bytes, content: bytes) -> None:
        """Add a header of the answer."""
        self.headers.append((name.lower(), content))

    def on_headers_complete(self) -> None:
        """Read the status from the head of the answer, and find out how the end of the body is marked."""
        self.status = self._parser.get_status_code()
        if self.status < 200:  # an interim answer, such as 100 Continue, precedes the final answer
            self.headers.clear()
            return
        self._has_head = True
        self._is_reusable = self._parser.should_keep_alive()
        names = dict(self.headers)
        has_length = b"content-length" in names or b"transfer-encoding" in names
        self._ends_at_eof = not has_length and self.status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        """Add a part of the answer's body."""
        self._pieces.append(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        """Record that the answer is complete, unless it was an interim answer."""
        self._is_complete = self._has_head

    async def _wait(self) -> None:
        if self._error:
            raise self._error
        self._waiter = self.loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error, self._is_reusable = self._error or error, False


class EngineConnections:
    """Sends requests to servers, and keeps idle connections for reuse. A server is identified by its address, HOST:PORT."""

    def __init__(self) -> None:
        self._idle: dict[str, dict[EngineConnection, None]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def post(self, address: str, head: bytes, body: Sequence[Piece]) -> EngineConnection:
        """Send a request and wait for the head of its answer. The caller must `release` the returned connection.

        If a reused connection ends before the first byte of the answer, the request is sent again on a new connection. A
        repeated request does no harm, because inference changes no state. Raises TimeoutError if the server does not accept
        connections. Can also raise ConnectionError or another OSError.
        """
        if connection := self._take(address):
            try:
                return await self._exchange(connection, head, body)
            except ConnectionError:
                if connection.has_begun:
                    raise
        return await self._exchange(await self._connect(address), head, body)

    def release(self, connection: EngineConnection) -> None:
        """End a request. If the connection can be reused, keep the connection for the next request; otherwise close it."""
        if not connection.end():
            return
        connection.idle_since_seconds = connection.loop.time()
        self._idle.setdefault(connection.address, {})[connection] = None
        if self._sweep is None:
            self._sweep = connection.loop.call_later(_IDLE_SECONDS, self._close_old)

    def close(self) -> None:
        """Close the idle connections."""
        if self._sweep:
            self._sweep.cancel()
            self._sweep = None
        self._close_idle_since(math.inf)

    async def _exchange(self, connection: EngineConnection, head: bytes, body: Sequence[Piece]) -> EngineConnection:
        try:
            await connection.send(head, body)
        except BaseException:
            self.release(connection)
            raise
        return connection

    def _take(self, address: str) -> EngineConnection | None:
        if idle := self._idle.get(address):
            connection, _ = idle.popitem()
            if connection.loop.time() - connection.idle_since_seconds < _IDLE_SECONDS:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self, address: str) -> EngineConnection:
        try:
            return await self._open(address)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.close()  # close the idle connections to free file descriptors
            return await self._open(address)

    async def _open(self, address: str) -> EngineConnection:
        host, _, port = address.rpartition(":")
        create = asyncio.get_running_loop().create_connection
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, connection = await create(lambda: EngineConnection(address, self._forget), host.strip("[]"), int(port))
        return connection

    def _forget(self, connection: EngineConnection) -> None:
        if idle := self._idle.get(connection.address):
            idle.pop(connection, None)

    def _close_old(self) -> None:
        loop = asyncio.get_running_loop()
        self._close_idle_since(loop.time() - _IDLE_SECONDS)
        self._sweep = loop.call_later(_IDLE_SECONDS, self._close_old) if self._idle else None

    def _close_idle_since(self, seconds: float) -> None:
        for connection in [connection for idle in self._idle.values() for connection in idle]:
            if connection.idle_since_seconds <= seconds:
                del self._idle[connection.address][connection]
                connection.transport.abort()
        self._idle = {address: idle for address, idle in self._idle.items() if idle}
