"""Logging: one line an event, with time, level and place, to stderr; and reading what was logged."""

import logging
import sys
from collections import deque
from pathlib import Path


def configure_logging(level: str = "INFO") -> None:
    """Send the log of this process to stderr; a detached process has a file there."""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        force=True,
    )
    for noisy in ("httpx", "httpcore", "alembic", "aiohttp.access", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def tail_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log; none where there is no log yet."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=count)]
    except FileNotFoundError:
        return []
