"""EngineProxy: forwards a request to an engine and relays its answer, with an error event if a stream breaks off."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from yarl import URL

from sage.common.errors import EngineError, SageError
from sage.llm.control_plane.routing import Upstream, unresponsive
from sage.llm.gateway.errors import out_of_descriptors
from sage.llm.gateway.gate import JSON_BODY, LARGE_BYTES

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: Whether the engine of an id answers its health checks.
IsResponsive = Callable[[str], bool]
#: How often a waiting request checks that its engine responds.
_CHECK_SECONDS = 0.5
#: There is no limit on the time that an engine takes; one that cannot be reached is reported at once.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
#: Headers of one connection only (RFC 9110, section 7.6.1), and those that the server or the client library sets itself.
_HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "content-length", "date", "server", "expect",
})  # fmt: skip
#: Headers that are meant for the gateway: key, cookies, origin of the client.
_GATEWAY_ONLY = frozenset({"authorization", "cookie", "host", "origin", "referer", "accept-encoding"})
_NOT_COMPRESSED = ("Accept-Encoding", "identity")
_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR = b'"error"'


class EngineProxy:
    """Connections to all engines, a new one for each request: an idle one could be closed just as it is used again."""

    def __init__(self, is_responsive: IsResponsive) -> None:
        """is_responsive: requests to an engine that stops responding are given up."""
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

    async def forward(self, upstream: Upstream, model: str, request: Request) -> Response:
        """Return the engine's answer, streamed if it streams; its `model` is what the server says.

        model: as the client named it; the engine is sent its server's name for it, and else the body as it is. If the
        client disconnects first, the upstream request is cancelled.
        Raises EngineError if the engine exits, Overloaded if it does not respond, ClientDisconnect.
        """
        body = await _take_body(request, None if upstream.model_name == model else upstream.model_name)
        exchange = _Exchange(upstream.engine_id, model, self._is_responsive)
        try:
            answer = await first_of(self._post(upstream, request, body), disconnected(request), exchange.unresponsive())
            if answer.content_type == "text/event-stream":
                return _Stream(answer, exchange, request.headers["x-request-id"])
            try:
                content = await first_of(answer.read(), disconnected(request), exchange.unresponsive())
            finally:
                answer.close()
        except (aiohttp.ClientError, OSError) as error:
            raise exchange.failure(error) from error
        response = Response(content, answer.status)
        response.raw_headers = [*_answer_headers(answer), (b"content-length", str(len(content)).encode())]
        return response

    async def _post(self, upstream: Upstream, request: Request, body: bytes) -> aiohttp.ClientResponse:
        query = f"?{request.url.query}" if request.url.query else ""
        return await self._session.post(
            URL(f"http://{upstream.address}{request.url.path}{query}", encoded=True),
            data=body,
            headers=[*_request_headers(request), _NOT_COMPRESSED],
            skip_auto_headers=("User-Agent",),
            allow_redirects=False,
        )


class _Exchange:
    """One request at one engine: whether the engine still responds, and how its failures are reported."""

    def __init__(self, engine_id: str, model: str, is_responsive: IsResponsive) -> None:
        self._engine_id, self._model, self._is_responsive = engine_id, model, is_responsive

    async def unresponsive(self) -> NoReturn:
        """Wait until the engine does not respond, then raise Overloaded."""
        while self._is_responsive(self._engine_id):  # noqa: ASYNC110 - a look-up in memory
            await asyncio.sleep(_CHECK_SECONDS)
        raise unresponsive(self._engine_id)

    async def while_responsive(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the pieces. Raises Overloaded if the engine stops responding."""
        watching = asyncio.ensure_future(self.unresponsive())
        piece: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                piece = asyncio.ensure_future(anext(pieces, None))
                await asyncio.wait({piece, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    watching.result()  # raises
                content = await piece
                if content is None:
                    return
                yield content
        finally:
            watching.cancel()
            if piece:
                piece.cancel()

    def failure(self, error: Exception) -> SageError:
        """Return the error to report if the connection to the engine failed."""
        if isinstance(error, SageError):
            return error
        if isinstance(error, TimeoutError):  # the connection was not even accepted
            return unresponsive(self._engine_id)
        return out_of_descriptors(error) or EngineError(
            code="engine_died",
            message=f"{self._engine_id} ('{self._model}') exited before its answer was complete.",
            hint=f"`sage llm engine status {self._engine_id}` shows why.",
        )


class _Stream(StreamingResponse):
    """A streamed answer. However it ends, the connection to the engine is closed, and so the engine stops its work."""

    def __init__(self, answer: aiohttp.ClientResponse, exchange: _Exchange, request_id: str) -> None:
        super().__init__(_relayed(answer, exchange, request_id), answer.status)
        self.raw_headers = list(_answer_headers(answer))
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _relayed(answer: aiohttp.ClientResponse, exchange: _Exchange, request_id: str) -> AsyncIterator[bytes]:
    try:
        async for lines in _whole_lines(exchange.while_responsive(answer.content.iter_any())):
            yield lines
    except (aiohttp.ClientError, OSError, EOFError, SageError) as error:
        failure = exchange.failure(error)
        logger.warning("%s: %s", request_id, failure.message)
        yield b"\n\ndata: " + json.dumps(failure.body()).encode() + b"\n\n"  # the empty line ends an incomplete event


async def _whole_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of an event stream, cut at line ends.

    Raises EOFError if the stream ends neither with [DONE] nor with an error; an incomplete last line is dropped then, so
    that an error event can follow.
    """
    rest, last_line = b"", b""
    async for piece in pieces:
        lines, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            last_line = next((line for line in reversed(lines.splitlines()) if line.strip()), last_line)
            yield lines + newline
    last_line = rest.strip() or last_line
    if not last_line.startswith(_DONE) and _ERROR not in last_line[:20]:
        raise EOFError("the stream ended early")
    if rest:
        yield rest


async def first_of(work: Coroutine[Any, Any, T], *watchers: Coroutine[Any, Any, NoReturn]) -> T:
    """Return the result of `work`, or raise what a watcher raises before it is done."""
    working = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(watcher) for watcher in watchers]
    try:
        done, _ = await asyncio.wait([working, *others], return_when=asyncio.FIRST_COMPLETED)
        if working not in done:
            next(iter(done)).result()  # raises
        return await working
    finally:
        for task in (working, *others):
            task.cancel()
        await asyncio.gather(working, *others, return_exceptions=True)


async def disconnected(request: Request) -> NoReturn:
    """Wait until the client disconnects, then raise ClientDisconnect. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _take_body(request: Request, model_name: str | None) -> bytes:
    """Return the body that the gate has read, its model renamed if a name is given.

    The parsed body leaves the request: it is several times as large, and not needed while the engine answers.
    """
    body, content = await request.body(), request.scope.pop(JSON_BODY)
    if model_name is None:
        return body
    renamed = {**content, "model": model_name}
    return await asyncio.to_thread(_encoded, renamed) if len(body) > LARGE_BYTES else _encoded(renamed)


def _encoded(content: dict[str, Any]) -> bytes:
    """Return JSON; not by orjson, which refuses integers beyond 64 bits instead of leaving that to the engine."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _request_headers(request: Request) -> Iterable[tuple[str, str]]:
    named = {name.strip().lower() for value in request.headers.getlist("connection") for name in value.split(",")}
    for raw_name, raw_value in request.headers.raw:
        name = raw_name.decode("latin-1").lower()
        if name not in _HOP_BY_HOP | _GATEWAY_ONLY | named:
            yield name, _text(raw_value)


def _answer_headers(answer: aiohttp.ClientResponse) -> Iterable[tuple[bytes, bytes]]:
    named = {name.strip().lower() for value in answer.headers.getall("Connection", []) for name in value.split(",")}
    for name, value in answer.raw_headers:
        if name.decode("latin-1").lower() not in _HOP_BY_HOP | named:
            yield name.lower(), value


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
