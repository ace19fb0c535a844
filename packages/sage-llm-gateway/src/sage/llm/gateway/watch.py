"""Giving up on an engine that hangs, as the control plane sees it, while a request waits for it."""

import asyncio
from collections.abc import AsyncIterator, Callable

from sage.llm.control_plane.routing import unresponsive

#: Whether the engine of an id answers its health checks.
IsResponsive = Callable[[str], bool]
_LOOK_SECONDS = 0.5


async def silence(engine_id: str, is_responsive: IsResponsive) -> None:
    """Wait until an engine hangs, and raise Overloaded then; never returns."""
    while is_responsive(engine_id):  # noqa: ASYNC110 - a look costs less than being told of every health check
        await asyncio.sleep(_LOOK_SECONDS)
    raise unresponsive(engine_id)


async def while_responsive(
    engine_id: str, is_responsive: IsResponsive, pieces: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Yield what comes; raises Overloaded if the engine hangs."""
    watching = asyncio.ensure_future(silence(engine_id, is_responsive))
    piece: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait({piece, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                watching.result()  # raises
            content = await piece
            if content is None:
                return
            yield content
    finally:
        watching.cancel()
        if piece:
            piece.cancel()
