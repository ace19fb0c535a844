"""Describe why a process exited: its exit code or signal, its last logged error, and the end of its log."""

import re
from pathlib import Path

from sage.common.logs import LogFile, tail_lines
from sage.common.processes import describe_exit

#: Number of bytes to read at the end of a log; the error is expected in the last line.
_TAIL_BYTES = 4096
_SHOWN_LINES, _SHOWN_CHARACTERS = 5, 300
#: Matches a line that does not explain an exit: a progress bar, a warning, or a log line of a level below ERROR.
_NO_ERROR = re.compile(r"\d%(\||$)|\d(it/s|s/it)\b|\b(INFO|DEBUG|WARNING|UserWarning|FutureWarning)\b")


def exit_message(what: str, code: int | None, log_path: Path) -> str:
    """Return a sentence that says how a process exited.

    The sentence includes the last line of the log, unless this line matches `_NO_ERROR`, the exit code is 0, or the process
    was killed by a signal.
    what: subject of the sentence.
    """
    sentence = f"{what} {describe_exit(code)}"
    error = "" if code is not None and code <= 0 else _last_error(log_path)
    return f"{sentence}: {error}" if error else f"{sentence}."


def log_hint(engine_id: str, log_path: Path) -> str:
    """Return a hint with the last lines of an engine's log and the command that prints the whole log."""
    command = f"`sage llm engine logs {engine_id}`"
    lines = [line[:_SHOWN_CHARACTERS] for line in tail_lines(log_path, _SHOWN_LINES) if line.strip()]
    if not lines:
        return f"{command} prints the log of the engine."
    return "\n".join(["The log of the engine ends with:", *(f"  {line}" for line in lines), f"The whole log: {command}."])


def _last_error(log_path: Path) -> str:
    log = LogFile(log_path)
    text = log.read(max(0, log.range()[1] - _TAIL_BYTES)).decode(errors="replace").strip()
    last = text.rpartition("\n")[2].rpartition("\r")[2].strip()
    return "" if _NO_ERROR.search(last) else last
