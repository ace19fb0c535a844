"""The result of a check of `sage doctor`."""

from dataclasses import dataclass
from typing import Literal

WITHOUT_LOCAL = "Install it: pip install 'sage-cli[local]'."


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: Literal["ok", "warning", "failed"]
    message: str
    remedy: str = ""


def last_line(output: str) -> str:
    """Return the last line of Python's error output, without the final period."""
    return (output.strip().splitlines() or ["Python exited without a message"])[-1].rstrip(".")
