"""Logging: one line an event, with time, level and place, to stderr."""

import logging
import sys


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
