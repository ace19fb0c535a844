"""Read engines, logs, events and training steps. A control plane on standby can read them too."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path

from sage.common.logs import LogFile, tail_lines
from sage.common.settings import Settings
from sage.common.training import TrainingStep
from sage.llm.client.types import SETTLED, Device, EngineEvent, EngineKind, EnginePage, EngineState, EngineView
from sage.llm.control_plane.admission import Wait
from sage.llm.control_plane.executors.base import Executor
from sage.llm.control_plane.inventory import Inventory, Occupant
from sage.llm.control_plane.logfile import follow
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.probes import Prober
from sage.llm.control_plane.queueing import is_waiting
from sage.llm.control_plane.reconciler import Reconciler
from sage.llm.control_plane.refusals import other_node
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.views import Views

_LIST_PAGE = 1000


class EngineReads:
    """The methods of ControlPlaneManager that only read. ControlPlaneManager sets the attributes of this base class."""

    _settings: Settings
    _node: str
    _executors: Mapping[EngineKind, Executor]
    _store: Store
    _pool: Pool
    _prober: Prober
    _reconciler: Reconciler
    _views: Views
    _inventory: Inventory

    async def page_engines(
        self,
        *,
        limit: int,
        after: str | None = None,
        states: Collection[EngineState] | None = None,
        kinds: Collection[EngineKind] | None = None,
        newest_first: bool = False,
    ) -> EnginePage:
        """Return one page of the engines of all nodes, in order of creation.

        after: `last_id` of the previous page. None: return the first page.
        """
        found, has_more = await self._pool.run(
            self._store.page, limit=limit, after=after, states=states, kinds=kinds, newest_first=newest_first
        )
        servers = await self._servers(found)
        views = await asyncio.to_thread(self._view_all, found, servers)
        first_id, last_id = (views[0].id, views[-1].id) if views else (None, None)
        return EnginePage(data=views, first_id=first_id, last_id=last_id, has_more=has_more)

    async def list_engines(self) -> list[EngineView]:
        """Return all engines, oldest first."""
        views: list[EngineView] = []
        after: str | None = None
        while True:
            page = await self.page_engines(limit=_LIST_PAGE, after=after)
            views += page.data
            if not page.has_more:
                return views
            after = page.last_id

    async def list_active(self) -> list[EngineView]:
        """Return the engines of this node that are neither stopped nor completed nor failed, oldest first."""
        engines = await self._pool.run(self._store.active, self._node)
        servers = await self._servers(engines)
        return await asyncio.to_thread(self._view_all, engines, servers)

    async def list_devices(self) -> list[Device]:
        """Return the devices of this node, each with the engines that use its memory. GPUs come first, main memory last."""
        engines = await self._pool.run(self._store.active, self._node)
        servers = await self._servers(engines)
        return await asyncio.to_thread(self._devices, engines, servers)

    async def counts(self) -> Mapping[tuple[EngineKind, EngineState], int]:
        """Return the number of engines of each kind in each state."""
        return await self._pool.run(self._store.count)

    def problems(self) -> list[str]:
        """Return the reasons why this control plane cannot manage some or all engines."""
        return self._reconciler.problems()

    async def get_engine(self, engine_id: str) -> EngineView:
        """Return an engine. Raises NotFound."""
        engine, server = await self._hosted(engine_id)
        return await self._view(engine, server)

    async def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        return await asyncio.to_thread(tail_lines, await self._log_path(engine_id), tail)

    async def follow_logs(self, engine_id: str, offset: int) -> AsyncIterator[bytes]:
        """Yield the log of an engine from byte `offset`, then new content as it is written, until the engine is settled."""

        async def has_ended() -> bool:
            return (await self._pool.run(self._store.get, engine_id)).state in SETTLED

        async for chunk in follow(await self._log_path(engine_id), offset, has_ended):
            yield chunk

    async def log_offset(self, engine_id: str, tail: int, offset: int | None = None) -> int:
        """Return the byte offset at which the last `tail` lines of an engine's log begin, or `offset` if `offset` is given.

        If `offset` is beyond the end of the log, return the offset of the end. If the byte at `offset` was removed because
        the log was too long, return the offset of the first byte that still exists.
        """
        log = LogFile(await self._log_path(engine_id))
        if offset is None:
            return await asyncio.to_thread(log.tail_offset, tail)
        start, end = await asyncio.to_thread(log.range)
        return min(max(offset, start), end)

    async def get_events(self, engine_id: str, after: int = 0) -> list[EngineEvent]:
        """Return at most 1000 events of an engine, oldest first. Raises NotFound.

        after: only events with ids above this id are returned.
        """
        await self._pool.run(self._store.get, engine_id)
        return await self._pool.run(self._store.events, after, limit=_LIST_PAGE, engine_id=engine_id)

    async def changes(self, after: int, limit: int) -> list[EngineEvent]:
        """Return at most `limit` events of all engines, oldest first.

        after: only events with ids above this id are returned.
        """
        return await self._pool.run(self._store.events, after, limit=limit)

    async def last_change(self) -> int:
        """Return the id of the newest event of all engines, or 0 if there are no events."""
        return await self._pool.run(self._store.last_event)

    async def get_training_steps(self, engine_id: str, after: int = 0, max_points: int | None = None) -> list[TrainingStep]:
        """Return the optimizer steps of a run after step `after`, downsampled to at most `max_points` steps."""
        engine, _ = await self._local(engine_id)
        return await self._executors[engine.kind].training_steps(engine, after, max_points)

    async def _hosted(self, engine_id: str) -> tuple[EngineRecord, ServerRecord | None]:
        found = await self._pool.run(self._store.hosted, [engine_id])
        return found[0] if found else (await self._pool.run(self._store.get, engine_id), None)

    async def _local(self, engine_id: str) -> tuple[EngineRecord, ServerRecord | None]:
        engine, server = await self._hosted(engine_id)
        if engine.node != self._node:
            raise other_node(engine)
        return engine, server

    async def _servers(self, engines: Collection[EngineRecord]) -> Mapping[str, ServerRecord]:
        ids = [engine.id for engine in engines if engine.state not in SETTLED]
        found = await self._pool.run(self._store.hosted, ids) if ids else []
        return {server.id: server for _, server in found if server}

    async def _log_path(self, engine_id: str) -> Path:
        engine, _ = await self._local(engine_id)
        return self._executors[engine.kind].log_path(engine)

    def _view_all(self, engines: Collection[EngineRecord], servers: Mapping[str, ServerRecord]) -> list[EngineView]:
        return [self._blocking_view(engine, servers.get(engine.server_id or "")) for engine in engines]

    def _devices(self, engines: Collection[EngineRecord], servers: Mapping[str, ServerRecord]) -> list[Device]:
        hosted: dict[str, EngineView] = {}
        for view in self._view_all(engines, servers):
            if view.server_id and view.server_id in servers:
                hosted.setdefault(view.server_id, view)  # only the first engine, to count the server's memory once
        return self._inventory.devices([_occupant(view, servers[server_id]) for server_id, view in hosted.items()])

    async def _view(self, engine: EngineRecord, server: ServerRecord | None) -> EngineView:
        return await asyncio.to_thread(self._blocking_view, engine, server)

    def _blocking_view(self, engine: EngineRecord, server: ServerRecord | None) -> EngineView:
        if is_waiting(engine):
            decision = self._reconciler.queue.decisions.get(engine.id)
            position = decision.position if isinstance(decision, Wait) else None
            return self._views.view(engine, None, None, self._reconciler.queue.reason(engine), position)
        if engine.state in SETTLED or engine.state is EngineState.PAUSED:  # the engine has no process to observe
            return self._views.view(engine, None, None)
        silent_seconds = 0.0 if self.is_responsive(engine.id) else self._reconciler.silent_seconds(engine.id)
        return self._views.view(
            engine,
            server,
            self._prober.last(engine.id),
            trouble=self._prober.trouble(engine.id),
            silent_seconds=silent_seconds,
        )

    def is_responsive(self, engine_id: str) -> bool:
        """Return whether an engine has been silent for less than `engine_unresponsive_seconds`."""
        return self._reconciler.silent_seconds(engine_id) < self._settings.engine_unresponsive_seconds


def _occupant(engine: EngineView, server: ServerRecord) -> Occupant:
    return Occupant(engine.id, engine.name, engine.pid, engine.memory_bytes, server.devices or (), server.reserved_bytes)
