"""What the data pipeline passes on: where a record stood, what it says, what is wrong with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Origin:
    """Where a record stands: the line of a text file on which it begins, else its number; both count from 1."""

    path: Path
    line: int
    unit: Literal["line", "record"] = "line"

    def __str__(self) -> str:
        """`file:line`, as editors understand it; or the file and the record."""
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}, {self.place}"

    @property
    def place(self) -> str:
        """The place within its file: `line 7` or `record 7`."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class Fault:
    """Something in a dataset that cannot be trained on."""

    origin: Origin
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.origin}: {self.message}{f' {self.hint}' if self.hint else ''}"


@dataclass(frozen=True)
class Chat:
    """A conversation: messages in OpenAI's shape, tools in OpenAI's shape."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    #: Indexes of assistant messages that are context only (OpenAI's `"weight": 0`).
    untrained: frozenset[int] = frozenset()
    #: Names of the record's fields that have no effect (`messages[].timestamp`, `source`).
    ignored: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sample:
    """One record that can be trained on."""

    origin: Origin
    format: str
    #: A chat, or plain text of which every token is trained on; else a row as a method of TRL's takes it.
    content: Any = field(repr=False)
    ignored: tuple[str, ...] = ()  #: names of the record's fields that have no effect
