"""Engines over HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, status
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.responses import Response

from sage.common.errors import NotFound
from sage.llm.client.types import SETTLED, EngineView, StartRequest
from sage.llm.control_plane.inventory import list_devices
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter(prefix="/v1/management")
_POLL_SECONDS = 0.3
T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


@router.post("/engines/start", status_code=status.HTTP_201_CREATED)
@router.post("/engines", status_code=status.HTTP_201_CREATED)
async def start_engine(request: StartRequest, manager: Manager) -> EngineView:
    """Check a request and queue its engine."""
    return await manager.start_engine(request)


@router.get("/engines")
async def list_engines(manager: Manager) -> dict[str, Any]:
    """Return all engines, oldest first."""
    return {"object": "list", "data": await manager.list_engines()}


@router.get("/engines/{engine_id}")
async def get_engine(engine_id: str, manager: Manager) -> EngineView:
    """Return one engine."""
    return await manager.get_engine(engine_id)


@router.delete("/engines/{engine_id}", status_code=status.HTTP_202_ACCEPTED)
async def stop_engine(engine_id: str, manager: Manager, force: bool = False) -> EngineView:
    """Ask an engine to save what it has and end; `force` kills it."""
    return await manager.stop_engine(engine_id, force=force)


@router.post("/engines/{engine_id}/resume", status_code=status.HTTP_202_ACCEPTED)
async def resume_engine(engine_id: str, manager: Manager) -> EngineView:
    """Queue a stopped or failed engine again."""
    return await manager.resume_engine(engine_id)


@router.post("/engines/{engine_id}/remove")
async def remove_engine(engine_id: str, manager: Manager) -> dict[str, Any]:
    """Forget an engine that has ended, with its run directory or log."""
    await manager.remove_engine(engine_id)
    return {"id": engine_id, "object": "engine", "deleted": True}


@router.get("/engines/{engine_id}/logs", response_class=PlainTextResponse)
async def engine_logs(
    engine_id: str,
    manager: Manager,
    tail: Annotated[int, Query(ge=0, le=100_000)] = 100,
    follow: bool = False,
    offset: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
) -> Response:
    """Return the last lines of an engine's log; `follow` streams what comes until it has ended.

    A stream says in X-Log-Offset at which byte of the log it begins, so that one that broke can go on from `offset`;
    an offset behind the end means the end.
    """
    if not follow:
        return PlainTextResponse("".join(f"{line}\n" for line in await manager.get_logs(engine_id, tail)))
    begin = await manager.log_offset(engine_id, tail, offset)
    lines = _until_removed(manager.follow_logs(engine_id, begin))
    return StreamingResponse(lines, media_type="text/plain", headers={"X-Log-Offset": str(begin)})


@router.get("/engines/{engine_id}/events", response_class=EventStream)
async def engine_events(engine_id: str, manager: Manager, follow: bool = True) -> EventStream:
    """Stream an engine's transitions as server-sent events until it has ended; all of the past ones come first."""
    await manager.get_engine(engine_id)
    return EventStream(_until_removed(_events(manager, engine_id, follow)))


@router.get("/engines/{engine_id}/training")
async def training_steps(engine_id: str, manager: Manager) -> dict[str, Any]:
    """Return the optimizer steps of a training run, oldest first."""
    return {"object": "list", "data": await manager.get_training_steps(engine_id)}


@router.get("/gpu")
async def gpu() -> dict[str, Any]:
    """Return the memory there is: GPUs first, main memory last."""
    return {"object": "list", "data": await asyncio.to_thread(list_devices)}


async def _until_removed(pieces: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield the pieces of a stream; it ends if its engine is removed."""
    with contextlib.suppress(NotFound):
        async for piece in pieces:
            yield piece


async def _events(manager: ControlPlaneManager, engine_id: str, follow: bool) -> AsyncIterator[str]:
    last = 0
    while True:
        has_ended = (await manager.get_engine(engine_id)).state in SETTLED  # before reading: its end is still sent
        for event in await manager.get_events(engine_id, last):
            last = event.id
            yield f"id: {event.id}\nevent: transition\ndata: {event.model_dump_json()}\n\n"
        if has_ended or not follow:
            return
        await asyncio.sleep(_POLL_SECONDS)
