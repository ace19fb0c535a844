"""Collect the values of all Prometheus metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from prometheus_client.core import Metric

from sage.common.identity import all_sessions, cpu_seconds
from sage.common.paths import get_user_paths
from sage.llm.client.types import Device, EngineKind, EngineState, EngineView
from sage.llm.control_plane.activity import Activity
from sage.llm.control_plane.lease import LeaseKeeper
from sage.llm.control_plane.metrics import Measured, all_metrics
from sage.llm.control_plane.probes import Prober
from sage.llm.control_plane.request_times import RequestTimes
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.token_counts import read_token_counts


class Measuring:
    """Collects the metrics. ControlPlaneManager inherits from this class and sets the attributes."""

    _store: Store
    _prober: Prober
    _keeper: LeaseKeeper
    _activity: Activity
    request_times: RequestTimes  #: the gateway adds the duration of each inference request
    counts: Callable[[], Awaitable[Mapping[tuple[EngineKind, EngineState], int]]]
    list_active: Callable[[], Awaitable[list[EngineView]]]
    waiting_engines: Callable[[], Awaitable[list[EngineView]]]
    list_devices: Callable[[], Awaitable[list[Device]]]

    async def metrics(self) -> list[Metric]:
        """Return the metrics of this node. The request times of engines that are no longer active are deleted."""
        active = await self.list_active()
        self.request_times.forget_all_but({engine.id for engine in active})
        observed = {engine.id: self._prober.last(engine.id) for engine in active}
        counted = {engine_id: seen.tokens for engine_id, seen in observed.items() if seen and seen.tokens}
        measured = Measured(
            active,
            await self.counts(),
            await self.waiting_engines(),
            await self.list_devices(),
            tokens={**counted, **await read_token_counts(active)},
            cpu_seconds=await asyncio.to_thread(_cpu_seconds, active),
            in_progress=self._activity.in_progress,
            request_times=self.request_times,
            transitions=self._store.transitions,
        )
        paths = get_user_paths()
        folders = {"data": paths.data_dir, "state": paths.state_dir}
        is_active = self._keeper.lease is not None
        return await asyncio.to_thread(lambda: list(all_metrics(measured, is_active=is_active, folders=folders)))


def _cpu_seconds(engines: list[EngineView]) -> Mapping[str, float]:
    """Return the CPU time of each engine. If engines share a server, only the first engine is in the result."""
    first: dict[int, str] = {}
    for engine in engines:
        if engine.pid:
            first.setdefault(engine.pid, engine.id)
    sessions = all_sessions() if first else {}
    return {engine_id: cpu_seconds(sessions.get(pid, [pid])) for pid, engine_id in first.items()}
