"""Readers of the gateway's streams. The sync client and the async client use the same readers."""

import json
import time
from collections.abc import Mapping
from typing import Generic, TypeVar

from pydantic import ValidationError

from sage.common.errors import EngineError, GatewayUnreachable
from sage.llm.client.answers import not_a_gateway, parse, rebuild_error
from sage.llm.client.types import EngineEvent

T = TypeVar("T")


class Lines:
    """Splits received bytes into lines of text."""

    def __init__(self) -> None:
        self.rest = b""  #: the received part of the last, incomplete line

    def feed(self, chunk: bytes) -> list[str]:
        """Add received bytes, and return the lines that are now complete, without line ends."""
        *complete, self.rest = (self.rest + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in complete]


class StreamReader(Generic[T]):
    """Reads the items of one stream. If the connection breaks, a new request can continue the same stream."""

    def __init__(self) -> None:
        self._lines = Lines()
        self.has_begun = False

    def begin(self, headers: Mapping[str, str]) -> None:
        """Prepare to read the stream from a new HTTP response.  headers: headers of the response."""
        self.has_begun, self._lines = True, Lines()

    def feed(self, chunk: bytes) -> list[T]:
        """Add received bytes, and return the items that are now complete."""
        raise NotImplementedError

    def finish(self) -> list[T]:
        """Return the remaining items at the end of the stream. Raises GatewayUnreachable if the end is unexpected."""
        return []


class LogReader(StreamReader[str]):
    """Reads the lines of a log."""

    offset: int | None = None  #: byte offset in the log after the last complete line

    def begin(self, headers: Mapping[str, str]) -> None:
        """Set `offset` to the value of the header X-Log-Offset: the position in the log at which the stream begins."""
        super().begin(headers)
        try:
            self.offset = int(headers["X-Log-Offset"])
        except (KeyError, ValueError) as error:
            raise not_a_gateway("the header X-Log-Offset is missing") from error

    def feed(self, chunk: bytes) -> list[str]:
        """Add received bytes, and return the lines that are now complete."""
        before = len(self._lines.rest)
        lines = self._lines.feed(chunk)
        self.offset = (self.offset or 0) + before + len(chunk) - len(self._lines.rest)
        return lines

    def finish(self) -> list[str]:
        """Return the last line if it has no line end, else []."""
        return [self._lines.rest.decode(errors="replace")] if self._lines.rest else []


class EventReader(StreamReader[EngineEvent]):
    """Reads server-sent events of engines, and returns each event once."""

    def __init__(self, cursor: int = 0, *, endless: bool = False) -> None:
        """cursor: id of the last event that was already read.  endless: whether the end of the stream is an error."""
        super().__init__()
        self.cursor, self._endless = cursor, endless

    def feed(self, chunk: bytes) -> list[EngineEvent]:
        """Add received bytes, and return the events that are now complete."""
        found = []
        for line in self._lines.feed(chunk):
            if line.startswith("data:"):
                event = _event(line.removeprefix("data:"))
                if event.id > self.cursor:
                    self.cursor = event.id
                    found.append(event)
        return found

    def finish(self) -> list[EngineEvent]:
        """Return []. Raises GatewayUnreachable if the end of the stream is an error."""
        if self._endless:
            raise GatewayUnreachable(code="stream_cut", message="The gateway ended the change feed.")
        return []


def _event(text: str) -> EngineEvent:
    try:
        return EngineEvent.model_validate_json(text)
    except ValidationError as error:
        raise not_a_gateway("an event has unexpected content") from error


class Patience:
    """Decides whether to request a broken stream again, or to give up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lost_at: float | None = None

    def reset(self) -> None:
        """Record that the gateway is reachable."""
        self._lost_at = None

    def is_over(self, reader: StreamReader[T]) -> bool:
        """Record that the gateway is unreachable, and return whether to give up."""
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        return not reader.has_begun or now - self._lost_at > self._seconds


class ChatReader:
    """Reads a streamed chat completion."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._is_done = False

    def feed(self, chunk: bytes) -> list[str]:
        """Add received bytes, and return the text that is now complete. Raises the error that the stream reports."""
        return [piece for line in self._lines.feed(chunk) if (piece := self._piece(line))]

    def _piece(self, line: str) -> str:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data.startswith("{"):
            self._is_done |= data == "[DONE]"
            return ""
        content = parse(data)
        try:
            if error := content.get("error"):
                raise rebuild_error(error, EngineError.http_status)
            choices = content["choices"]
            return str(choices[0]["delta"].get("content") or "") if choices else ""
        except (KeyError, TypeError, AttributeError, IndexError) as problem:
            raise not_a_gateway(
                f"a part of the answer cannot be read; its JSON keys are {json.dumps(sorted(content))}"
            ) from problem

    def finish(self) -> None:
        """Raise EngineError if the answer is incomplete."""
        if not self._is_done:
            raise EngineError(
                code="stream_cut",
                message="The answer ended before it was complete.",
                hint="`sage llm engine list` shows whether the engine still runs.",
            )
