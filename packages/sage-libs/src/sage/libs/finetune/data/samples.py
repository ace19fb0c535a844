"""Types of the data pipeline: positions of records, faults, chats and samples."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Origin:
    """Position of a record: the number of its first line, or its number in a JSON list or table. Numbers begin at 1."""

    path: Path
    line: int
    unit: Literal["line", "record"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}, {self.place}"

    @property
    def place(self) -> str:
        """The position within the file: `line 7` or `record 7`."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class Fault:
    """An error in a dataset, with its position."""

    origin: Origin
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}{f' {self.hint}' if self.hint else ''}"


@dataclass(frozen=True)
class Chat:
    """A conversation: messages and tools in OpenAI's format."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    #: Indexes of assistant messages that are excluded from training (OpenAI's `"weight": 0`).
    untrained: frozenset[int] = frozenset()
    #: Names of the record's fields that have no effect, for example `messages[].timestamp` or `source`.
    ignored: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sample:
    """One record that can be trained on."""

    origin: Origin
    format: str
    #: A Chat, a str (all tokens of the text are trained on), or a row in the format of a TRL trainer.
    content: Any = field(repr=False)
    ignored: tuple[str, ...] = ()  #: names of the record's fields that have no effect
