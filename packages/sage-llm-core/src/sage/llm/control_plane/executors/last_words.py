"""Why a process ended: how it ended comes first, then the error that it logged, if it did."""

import re
from pathlib import Path

from sage.common.logs import tail_lines
from sage.common.processes import describe_exit

_LINES = 20
#: A progress bar, a warning, a line of the log that tells no error: not why it ended.
_NO_ERROR = re.compile(r"\d%(\||$)|\d(it/s|s/it)\b|\b(INFO|DEBUG|WARNING|UserWarning|FutureWarning)\b")


def last_words(what: str, code: int | None, log_path: Path) -> str:
    """Return a sentence on how `what` ended; the log is asked only about an end of the process's own."""
    told = f"{what} {describe_exit(code)}"
    error = "" if code is not None and code <= 0 else _error_line(log_path)
    return f"{told}: {error}" if error else f"{told}."


def _error_line(log_path: Path) -> str:
    lines = [line.strip() for line in tail_lines(log_path, _LINES) if line.strip()]
    return lines[-1] if lines and not _NO_ERROR.search(lines[-1]) else ""
