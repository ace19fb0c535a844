"""Follow a log while other processes append to the log and remove the beginning of the log."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sage.common.logs import LogFile

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1024 * 1024


async def follow(path: Path, offset: int, has_ended: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """Yield the bytes of a log from `offset`, then each new part, until `has_ended` returns True and all bytes were read.

    If the byte at `offset` was removed, begin at the first byte that still exists. If `offset` is beyond
    the end, begin at the end.
    """
    log = LogFile(path)
    offset = min(offset, (await asyncio.to_thread(log.range))[1])
    while True:
        # Call `has_ended` before `log.read`: in the reverse order, bytes written between the two calls would be missed.
        ended = await has_ended()
        offset = max(offset, (await asyncio.to_thread(log.range))[0])
        chunk = await asyncio.to_thread(log.read, offset, _CHUNK_BYTES)
        offset += len(chunk)
        if chunk:
            yield chunk
        elif ended:
            return
        else:
            await asyncio.sleep(_POLL_SECONDS)
