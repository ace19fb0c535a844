"""Send the events of engines as server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi.responses import StreamingResponse

from sage.common.errors import NotFound
from sage.llm.client.types import SETTLED, EngineEvent
from sage.llm.control_plane.manager import ControlPlaneManager

_POLL_SECONDS = 0.3
_EVENTS_AT_ONCE = 500
#: If no event is sent for this number of seconds, a comment is sent, so that no proxy closes the connection.
_KEEP_ALIVE_SECONDS = 15.0
T = TypeVar("T")


class EventStream(StreamingResponse):
    """A response of server-sent events. Comments between the events keep the connection open."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], status_code: int = 200) -> None:
        super().__init__(_kept_alive(events), status_code)


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    following: asyncio.Future[str | None] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events, None))
            await asyncio.wait({following}, timeout=_KEEP_ALIVE_SECONDS)
            if not following.done():
                yield ": keep-alive\n\n"
                continue
            event, following = following.result(), None
            if event is None:
                return
            yield event
    finally:
        if following:
            following.cancel()


async def all_changes(manager: ControlPlaneManager, cursor: int) -> AsyncIterator[str]:
    """Yield the events of all engines after a cursor, then each new event. The iterator never ends."""
    while True:
        events = await manager.changes(cursor, _EVENTS_AT_ONCE)
        for event in events:
            yield _sse(event)
            cursor = event.id
        if len(events) < _EVENTS_AT_ONCE:
            await asyncio.sleep(_POLL_SECONDS)


async def engine_transitions(manager: ControlPlaneManager, engine_id: str, cursor: int, follow: bool) -> AsyncIterator[str]:
    """Yield the events of an engine after a cursor; with `follow`, also each new event until the engine has ended."""
    while True:
        # The state is read before the events, so that the last event is not missed if the engine ends between the two reads.
        has_ended = (await manager.get_engine(engine_id)).state in SETTLED
        while events := await manager.get_events(engine_id, cursor):
            for event in events:
                yield _sse(event)
            cursor = events[-1].id
        if has_ended or not follow:
            return
        await asyncio.sleep(_POLL_SECONDS)


async def until_removed(pieces: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield the pieces of an engine's stream; if the engine is removed, end the stream without an error."""
    with contextlib.suppress(NotFound):
        async for piece in pieces:
            yield piece


def _sse(event: EngineEvent) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
