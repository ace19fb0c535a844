"""Configure logging to stderr (one line per event: time, level, logger, message), and read log files."""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sage.common.paths import private_file

_BLOCK_BYTES = 64 * 1024


def configure_logging(level: str = "INFO") -> None:
    """Write log messages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic", "aiohttp.access", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level)))


class _LineFormatter(logging.Formatter):
    """A formatter that formats the time only once for all records of the same second."""

    _second, _time = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.exc_text or record.stack_info:
            return super().format(record)
        if int(record.created) != self._second:
            self._second, self._time = int(record.created), self.formatTime(record, self.datefmt)
        return f"{self._time} {record.levelname:<7} {record.name}: {record.getMessage()}"


def tail_lines(path: Path, count: int) -> list[str]:
    """Return the last `count` lines of a log, or [] if the log does not exist yet.

    In each line, only the text after the last carriage return is kept, as in a terminal.
    """
    log = LogFile(path)
    text = log.read(log.tail_offset(count)).decode(errors="replace")
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


class LogFile:
    """A log file of limited size: `cut` removes its beginning. The byte offsets of the remaining text stay valid.

    A cut moves the last part of the log to a second file, and deletes the second file of the previous cut. The name
    of a second file ends with the log offset at which the file begins: `engine.log.500` begins at byte 500 of the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, limit_bytes: int) -> bool:
        """Cut the file if it is longer than `limit_bytes`; return whether the file was cut.

        The process that writes the log must have opened the file for appending. The next write of this process then goes to
        the beginning of the emptied file.
        """
        skipped = _size(self.path) - limit_bytes
        if skipped <= 0:
            return False
        old, base = self._old_part()
        aside = private_file(self.path.with_name(f".{self.path.name}.partial"))
        with self.path.open("rb") as source, aside.open("wb") as target:
            source.seek(skipped)
            shutil.copyfileobj(source, target, _BLOCK_BYTES * 16)
        with self._locked(fcntl.LOCK_EX):
            os.truncate(self.path, 0)
            os.replace(aside, self.path.with_name(f"{self.path.name}.{base + skipped}"))
            if old:
                old.unlink()
        return True

    def range(self) -> tuple[int, int]:
        """Return the offset of the first byte that is still available, and the offset of the end."""
        with self._locked(fcntl.LOCK_SH):
            old, base = self._old_part()
            return (base - _size(old) if old else base), base + _size(self.path)

    def read(self, offset: int, limit_bytes: int | None = None) -> bytes:
        """Return the content from byte `offset` on; if this byte was cut off, start at the first available byte."""
        with self._locked(fcntl.LOCK_SH):
            old, base = self._old_part()
            content = b""
            if old and offset < base:
                content = _read(old, max(0, offset - base + _size(old)), limit_bytes)
            if limit_bytes is None or len(content) < limit_bytes:
                rest = None if limit_bytes is None else limit_bytes - len(content)
                content += _read(self.path, max(0, offset - base), rest)
            return content

    def tail_offset(self, lines: int) -> int:
        """Return the offset at which the last `lines` lines begin.

        If the log has fewer lines, return the first available offset.
        """
        start, end = self.range()
        at = end
        while at > start and lines:
            begin = max(start, at - _BLOCK_BYTES)
            block = self.read(begin, at - begin)
            if at == end:
                block = block.removesuffix(b"\n")
            if (breaks := block.count(b"\n")) >= lines:
                position = len(block)
                for _ in range(lines):
                    position = block.rindex(b"\n", 0, position)
                return begin + position + 1
            at, lines = begin, lines - breaks
        return at

    @contextlib.contextmanager
    def _locked(self, operation: int) -> Iterator[None]:
        """Lock the log: shared for readers, exclusive for a cut, so that no reader sees a partial cut."""
        mode = "r+b" if operation == fcntl.LOCK_EX else "rb"  # on NFS, an exclusive lock needs a writable file
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                fcntl.flock(stack.enter_context(self.path.open(mode)), operation)
            yield

    def _old_part(self) -> tuple[Path | None, int]:
        """Return the second file (None if it does not exist), and the offset in the log at which `self.path` begins."""
        begins = {}
        for path in self.path.parent.glob(f"{self.path.name}.*"):
            if (number := path.name.removeprefix(f"{self.path.name}.")).isdecimal():
                begins[int(number)] = path
        if not begins:
            return None, 0
        begin = max(begins)
        return begins[begin], begin + _size(begins[begin])


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path else 0
    except FileNotFoundError:
        return 0


def _read(path: Path, position: int, limit_bytes: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(-1 if limit_bytes is None else limit_bytes)
    except FileNotFoundError:
        return b""
