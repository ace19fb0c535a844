"""The HTTP routes for engines."""

import asyncio
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Query, status
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import Field
from starlette.responses import Response

from sage.common.errors import ConfigError
from sage.llm.client.types import (
    EngineKind,
    EnginePage,
    EngineQueue,
    EngineState,
    EngineView,
    EstimateView,
    EventPage,
    MoveRequest,
    StartRequest,
)
from sage.llm.control_plane.backends.registry import list_backends
from sage.llm.control_plane.estimates import estimate_engine
from sage.llm.gateway.event_streams import EventStream, all_changes, engine_transitions, until_removed
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter(prefix="/v1/management")
_MAX_INT = 2**63
E = TypeVar("E", bound=StrEnum)
#: A position in the change feed: the id of the last event that was read, or `latest`.
Cursor = Annotated[Annotated[int, Field(ge=0, lt=_MAX_INT)] | Literal["latest"], Query()]
#: The header `Last-Event-ID`: the id of the last event that the client received. Browsers send the header if they reconnect.
LastEventId = Annotated[int | None, Header(ge=0, lt=_MAX_INT)]


@router.post("/engines/start", status_code=status.HTTP_201_CREATED)
@router.post("/engines", status_code=status.HTTP_201_CREATED)
async def start_engine(request: StartRequest, manager: Manager) -> EngineView:
    """Create an engine in the state `validating`. The response is sent before the dataset or model is checked."""
    return await manager.start_engine(request)


@router.get("/engines")
async def list_engines(
    manager: Manager,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of the previous page.")] = None,
    state: Annotated[str | None, Query(max_length=200, description="States, separated by commas.")] = None,
    kind: Annotated[str | None, Query(max_length=200, description="Kinds, separated by commas.")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="asc: oldest first; desc: newest first.")] = "asc",
) -> EnginePage:
    """Return one page of the list of engines."""
    return await manager.page_engines(
        limit=limit,
        after=after,
        states=_members(EngineState, state, "state"),
        kinds=_members(EngineKind, kind, "kind"),
        newest_first=order == "desc",
    )


@router.get("/events", response_model=EventPage,
            responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})  # fmt: skip
async def list_changes(
    manager: Manager,
    after: Cursor = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    follow: bool = False,
    last_event_id: LastEventId = None,
) -> EventPage | EventStream:
    """Return the events of all engines after a cursor. With `follow`, stream past and new events as server-sent events.

    With `after=latest`, the response contains no past events, and `last_id` is the cursor for new events.
    The id of a server-sent event is a cursor. Clients that reconnect send this id as the header `Last-Event-ID`, which
    overrides `after`.
    """
    if follow and last_event_id is not None:
        after = last_event_id
    cursor = await manager.last_change() if after == "latest" else after
    if follow:
        return EventStream(all_changes(manager, cursor))
    events = await manager.changes(cursor, limit + 1)
    data = events[:limit]
    return EventPage(data=data, last_id=data[-1].id if data else cursor, has_more=len(events) > limit)


@router.get("/engines/{engine_id}")
async def get_engine(engine_id: str, manager: Manager) -> EngineView:
    """Return one engine."""
    return await manager.get_engine(engine_id)


@router.delete("/engines/{engine_id}", status_code=status.HTTP_202_ACCEPTED)
async def stop_engine(engine_id: str, manager: Manager, force: bool = False) -> EngineView:
    """Ask an engine to exit; a training run saves a checkpoint first. With `force`, kill the engine."""
    return await manager.stop_engine(engine_id, force=force)


@router.get("/queue")
async def get_queue(manager: Manager) -> EngineQueue:
    """Return the waiting engines of this node (this SAGE installation), in the order of the queue."""
    return EngineQueue(data=await manager.waiting_engines())


@router.post("/engines/{engine_id}/move", status_code=status.HTTP_202_ACCEPTED)
async def move_engine(engine_id: str, request: MoveRequest, manager: Manager) -> EngineView:
    """Move a waiting engine to another place in the queue, among the engines with the same priority."""
    return await manager.move_engine(engine_id, request.position)


@router.post("/engines/{engine_id}/pause", status_code=status.HTTP_202_ACCEPTED)
async def pause_engine(engine_id: str, manager: Manager) -> EngineView:
    """Ask an engine to release its memory until the engine is resumed."""
    return await manager.pause_engine(engine_id)


@router.post("/engines/{engine_id}/resume", status_code=status.HTTP_202_ACCEPTED)
async def resume_engine(engine_id: str, manager: Manager) -> EngineView:
    """Start a stopped or failed engine again, or load a paused engine. A training run continues from its last checkpoint."""
    return await manager.resume_engine(engine_id)


@router.post("/engines/{engine_id}/checkpoint", status_code=status.HTTP_202_ACCEPTED)
async def checkpoint_engine(engine_id: str, manager: Manager) -> EngineView:
    """Ask a training run to save a checkpoint after its current step. A run with `serve` also serves this checkpoint."""
    return await manager.checkpoint_engine(engine_id)


@router.post("/engines/{engine_id}/remove")
async def remove_engine(engine_id: str, manager: Manager) -> dict[str, Any]:
    """Delete a stopped, completed or failed engine and its log. For a training run, also delete the run directory."""
    await manager.remove_engine(engine_id)
    return {"id": engine_id, "object": "engine", "deleted": True}


@router.get("/engines/{engine_id}/logs", response_class=PlainTextResponse)
async def engine_logs(
    engine_id: str,
    manager: Manager,
    tail: Annotated[int, Query(ge=0, le=100_000)] = 100,
    follow: bool = False,
    offset: Annotated[int | None, Query(ge=0, lt=_MAX_INT)] = None,
) -> Response:
    """Return the last lines of an engine's log; with `follow`, also stream new lines until the engine has ended.

    The header X-Log-Offset contains the byte offset at which a stream begins. To continue an interrupted stream, add the
    number of received bytes to this offset, and send the sum as `offset`. An offset beyond the end of the log means the end.
    """
    if not follow:
        return PlainTextResponse("".join(f"{line}\n" for line in await manager.get_logs(engine_id, tail)))
    begin = await manager.log_offset(engine_id, tail, offset)
    lines = until_removed(manager.follow_logs(engine_id, begin))
    return StreamingResponse(lines, media_type="text/plain", headers={"X-Log-Offset": str(begin)})


@router.get("/engines/{engine_id}/events", response_class=EventStream)
async def engine_events(
    engine_id: str,
    manager: Manager,
    follow: bool = True,
    after: Annotated[int, Query(ge=0, lt=_MAX_INT, description="Return only the events after this id.")] = 0,
    last_event_id: LastEventId = None,
) -> EventStream:
    """Stream an engine's past events as server-sent events; with `follow`, also new events until the engine has ended.

    The header `Last-Event-ID` overrides `after`.
    """
    await manager.get_engine(engine_id)
    cursor = after if last_event_id is None else last_event_id
    return EventStream(until_removed(engine_transitions(manager, engine_id, cursor, follow)))


@router.get("/engines/{engine_id}/training")
async def training_steps(
    engine_id: str,
    manager: Manager,
    after: Annotated[int, Query(ge=0, lt=_MAX_INT, description="Return only the steps after this step.")] = 0,
    max_points: Annotated[int | None, Query(ge=2, le=100_000, description="Maximum number of steps to return.")] = None,
) -> dict[str, Any]:
    """Return optimizer steps of a training run, oldest first."""
    return {"object": "list", "data": await manager.get_training_steps(engine_id, after, max_points)}


@router.get("/gpu")
async def gpu(manager: Manager) -> dict[str, Any]:
    """Return the devices, their memory and the engines that use the memory; GPUs first, main memory last."""
    return {"object": "list", "data": await manager.list_devices()}


@router.post("/estimate")
async def estimate(request: StartRequest, manager: Manager) -> EstimateView:
    """Return the memory that an engine would need. For a training run, options that name files may be omitted."""
    return await asyncio.to_thread(estimate_engine, request, await manager.list_devices())


@router.get("/backends")
async def backends() -> dict[str, Any]:
    """Return the backends (programs that run engines), and whether each is installed."""
    return {"object": "list", "data": await asyncio.to_thread(list_backends)}


def _members(members: type[E], text: str | None, param: str) -> list[E] | None:
    if text is None:
        return None
    try:
        return [members(name.strip()) for name in text.split(",")]
    except ValueError as error:
        message = f"{param}: {error}; valid values: {', '.join(members)}."
        raise ConfigError(code="config_invalid", message=message, param=param) from error
