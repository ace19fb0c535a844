"""Relay an engine's complete or streamed answer to the client, with the engine's name as the answer's `model`."""

import json
import logging

from starlette.types import Send

from sage.common.errors import EngineError, SageError
from sage.llm.control_plane.routing import Upstream, unresponsive
from sage.llm.gateway.engine_connections import EngineConnection
from sage.llm.gateway.errors import out_of_descriptors
from sage.llm.gateway.headers import forwarded
from sage.llm.gateway.json_text import answer_with_model, quoted

logger = logging.getLogger(__name__)
_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR = b'"error"'


class EventLines:
    """Splits an event stream into complete lines, and replaces the `model` of each answer."""

    def __init__(self, model: bytes) -> None:
        """model: the new value of `model`, as a JSON string."""
        self._model = model
        self._rest = self._last_lines = b""

    def feed(self, piece: bytes) -> bytes:
        """Add a piece of the stream, and return the lines that are now complete."""
        lines, newline, self._rest = (self._rest + piece).rpartition(b"\n")
        if not newline:
            return b""
        if lines.strip():
            self._last_lines = lines
        return self._renamed(lines) + newline

    def end(self) -> bytes:
        """End the stream, and return the last line if it does not end with a line break.

        Raises EOFError if the last line is neither [DONE] nor an error. An incomplete last line is then discarded, so that
        the caller can send an error event next.
        """
        last_line = self._rest.strip() or self._last_lines.strip().rpartition(b"\n")[2]
        if not last_line.startswith(_DONE) and _ERROR not in last_line[:20]:
            raise EOFError("the stream ended early")
        return self._renamed(self._rest)

    def _renamed(self, lines: bytes) -> bytes:
        if lines.count(b'"model"') < 2:  # the lines contain at most one answer
            return answer_with_model(lines, self._model)
        return b"\n".join([line and answer_with_model(line, self._model) for line in lines.split(b"\n")])


class Relay:
    """Forwards one answer of an engine to the client."""

    def __init__(self, upstream: Upstream, send: Send) -> None:
        self._upstream, self._send = upstream, send
        self._is_stream = False

    async def forward(self, answer: EngineConnection) -> None:
        """Send the engine's answer to the client. Raises OSError or EOFError if the answer ends early."""
        headers = [*forwarded(answer.headers), (b"x-sage-engine-id", self._upstream.engine_id.encode())]
        known = dict(headers)
        media_type = known.get(b"content-type", b"")
        if media_type.startswith(b"text/event-stream"):
            await self._stream(answer, headers)
            return
        content = await answer.read()
        if media_type.startswith(b"application/json") and not known.get(b"content-encoding"):
            content = answer_with_model(content, quoted(self._upstream.name))
        headers.append((b"content-length", str(len(content)).encode()))
        await self._start(answer.status, headers)
        await self._body(content)

    async def _stream(self, answer: EngineConnection, headers: list[tuple[bytes, bytes]]) -> None:
        self._is_stream = True
        await self._start(answer.status, headers)
        lines = EventLines(quoted(self._upstream.name))
        while piece := await answer.piece():
            if whole := lines.feed(piece):
                await self._body(whole, more=True)
        await self._body(lines.end())

    async def fail(self, error: Exception, request_id: str) -> None:
        """Report an error: if a stream has begun, end it with an error event; otherwise raise a SageError."""
        failure = self._failure(error)
        if not self._is_stream:
            raise failure from error
        logger.warning("%s: %s", request_id, failure.message)
        event = json.dumps(failure.body()).encode()
        await self._body(b"\n\ndata: %s\n\n" % event)  # the empty line terminates an incomplete event

    def _failure(self, error: Exception) -> SageError:
        engine_id = self._upstream.engine_id
        if isinstance(error, SageError):
            return error
        if isinstance(error, TimeoutError):  # the server did not accept the connection
            return unresponsive(engine_id)
        return out_of_descriptors(error) or EngineError(
            code="engine_died",
            message=f"{engine_id} ('{self._upstream.name}') exited before its answer was complete.",
            hint=f"`sage llm engine status {engine_id}` shows the reason.",
        )

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, content: bytes, *, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": more})
