"""Pause engines, and list and move the engines that wait for memory."""

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from sage.llm.client.types import SETTLED, DesiredState, EngineState, EngineView
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.queueing import is_waiting, rank, rank_at
from sage.llm.control_plane.refusals import busy, not_pausable, not_queued
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.store.store import StaleWrite, Store

#: The value of `actor` in events that a request causes.
ACTOR = "user"
#: Maximum attempts for a write that conflicts with a concurrent write.
ATTEMPTS = 5


class Waiting:
    """Base class of ControlPlaneManager with the methods for waiting engines. ControlPlaneManager sets the attributes."""

    _node: str
    _store: Store
    _pool: Pool
    _routing: RoutingTable
    _write: Callable[..., Any]
    _own: Callable[[str], Awaitable[tuple[EngineRecord, ServerRecord | None]]]
    _view: Callable[[EngineRecord, ServerRecord | None], Awaitable[EngineView]]

    async def pause_engine(self, engine_id: str) -> EngineView:
        """Request that an engine is paused, and return the engine at once.

        An inference engine first answers its open requests. A training run first saves a checkpoint. The engine then
        frees its memory, and stays paused until a user resumes it. Raises Conflict if the engine is stopped,
        completed or failed, or if the engine is being stopped or validated.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            if engine.paused_by == "user" and engine.desired is DesiredState.PAUSED:
                return await self._view(engine, server)
            is_stopping = engine.desired is DesiredState.STOPPED or engine.state in SETTLED
            if is_stopping or engine.state is EngineState.VALIDATING:
                raise not_pausable(engine)
            with contextlib.suppress(StaleWrite):
                pause = functools.partial(self._store.set_desired, engine, DesiredState.PAUSED, force=False)
                written = await self._write(pause, actor=ACTOR, paused_by="user", last_request_at=None)
                self._routing.apply(written, server)
                return await self._view(written, server)
        raise busy(engine_id)

    async def waiting_engines(self) -> list[EngineView]:
        """Return the waiting engines of this node, in the order of the queue."""
        return [await self._view(engine, None) for engine in await self._waiting()]

    async def move_engine(self, engine_id: str, position: int) -> EngineView:
        """Move a waiting engine to `position` in the queue (1: the front). The engine's priority can limit the move.

        Raises Conflict if the engine does not wait.
        """
        for _ in range(ATTEMPTS):
            engine, server = await self._own(engine_id)
            if not is_waiting(engine):
                raise not_queued(engine)
            new_rank = rank_at(engine, position, await self._waiting())
            with contextlib.suppress(StaleWrite):
                return await self._view(
                    await self._write(self._store.revise, engine, actor=ACTOR, queue_rank=new_rank), server
                )
        raise busy(engine_id)

    async def _waiting(self) -> list[EngineRecord]:
        return sorted(filter(is_waiting, await self._pool.run(self._store.active, self._node)), key=rank)
