"""Following a log that grows."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

_POLL_SECONDS = 0.2
_BLOCK_BYTES = 64 * 1024


def tail_offset(path: Path, lines: int) -> int:
    """Return the byte at which the last `lines` lines of a file begin; 0 where there is no file yet."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            seen, at = b"", end
            while at and seen.count(b"\n") <= lines:
                at = max(0, at - _BLOCK_BYTES)
                file.seek(at)
                seen = file.read(end - at)
    except FileNotFoundError:
        return 0
    return end - sum(map(len, seen.splitlines(keepends=True)[-lines:])) if lines else end


async def follow(path: Path, offset: int, has_ended: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """Yield what a file holds from a byte on, and what is added, until `has_ended` and all was read."""
    while True:
        ended = await has_ended()  # before reading: what is written last is still read
        chunk = await asyncio.to_thread(_read_from, path, offset)
        offset += len(chunk)
        if chunk:
            yield chunk
        elif ended:
            return
        else:
            await asyncio.sleep(_POLL_SECONDS)


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""
