"""Following a log that grows, and may be cut meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sage.common.logs import LogFile

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1024 * 1024


async def follow(path: Path, offset: int, has_ended: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """Yield what a log holds from an offset on, and what is added, until `has_ended` and all was read.

    An offset of what is no longer there means the first byte that is, and one beyond the end means the end.
    """
    log = LogFile(path)
    offset = min(offset, (await asyncio.to_thread(log.range))[1])
    while True:
        ended = await has_ended()  # before reading: what is written last is still read
        offset = max(offset, (await asyncio.to_thread(log.range))[0])
        chunk = await asyncio.to_thread(log.read, offset, _CHUNK_BYTES)
        offset += len(chunk)
        if chunk:
            yield chunk
        elif ended:
            return
        else:
            await asyncio.sleep(_POLL_SECONDS)
