"""Bring engines closer to their desired states: read the store, observe the engines, plan, and start the actions."""

import logging
import time
from collections.abc import Mapping, Sequence

from sage.llm.client.types import EngineState
from sage.llm.control_plane.core_balance import CoreBalancer
from sage.llm.control_plane.cores import Cores
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.node_memory import NodeMemory
from sage.llm.control_plane.plan import Limits, Snapshot, decide
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.probes import Prober
from sage.llm.control_plane.queueing import Memory, Queue, is_waiting
from sage.llm.control_plane.runner import Runner
from sage.llm.control_plane.sleeping import unneeded
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.watch import Watch

logger = logging.getLogger(__name__)


class Reconciler:
    """Each tick reads the store, passes the engines to the prober, and runs the plan if this control plane is active."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        node: str,
        prober: Prober,
        runner: Runner,
        limits: Limits,
        memory: NodeMemory | None = None,
        cores: Cores | None = None,
        balancer: CoreBalancer | None = None,
    ) -> None:
        """memory: object that measures the memory of the devices. None: no engine waits for memory.

        cores: the cores that engines share. None: each server uses its default number of threads.
        """
        self._memory, self._cores, self._balancer = memory, cores, balancer
        self._store, self._pool, self._node = store, pool, node
        self._prober, self._runner, self._limits = prober, runner, limits
        self.queue = Queue()  #: the decisions of the last tick; empty if this control plane is not active
        self._watches: dict[str, Watch] = {}
        self._errors: dict[str, Exception] = {}  #: errors of the last tick, by engine id; "": error of the whole tick

    async def tick(self, *, is_active: bool) -> None:
        """Observe all engines and, if `is_active`, start the next actions. Errors are logged, and reported by `problems`."""
        if not is_active:
            self.queue = Queue()
        try:
            await self._tick(is_active=is_active)
        except Exception as error:  # noqa: BLE001 - logged; the next tick tries again
            self._note({"": error})
        else:
            self._note(self.queue.errors)

    def problems(self) -> list[str]:
        """Return a message for each error of the last tick."""
        hint = "`sage gateway logs` shows the traceback."
        return [
            f"{f'The next action of {engine_id}' if engine_id else 'The next actions'} cannot be planned: "
            f"{type(error).__name__}. {hint}"
            for engine_id, error in self._errors.items()
        ]

    async def _tick(self, *, is_active: bool) -> None:
        engines = await self._pool.run(self._store.active, self._node)
        servers = {server.id: server for server in await self._pool.run(self._store.servers, self._node)}
        self._prober.watch(engines, servers)
        observed = self._prober.observed()
        self._look(engines, observed)
        if not is_active:
            return
        validating = [engine.id for engine in engines if engine.state is EngineState.VALIDATING]
        results = self._runner.validator.results(validating)
        memory = await self._look_at_memory(engines, observed) if any(map(is_waiting, engines)) else None
        snapshot = Snapshot(engines, servers, observed, self._watches, results, self._limits, memory, self._cores)
        actions, self.queue = decide(snapshot)
        for action in actions:
            engine = action.engine
            self._runner.run(action, observed.get(engine.id), servers.get(engine.server_id or ""))
        for server in unneeded(engines, servers, observed, self.queue.evicted):
            self._runner.sleeper.end(server)
        if self._balancer:
            self._balancer.balance(engines, servers, observed)

    def silent_seconds(self, engine_id: str) -> float:
        """Return how long a running inference engine has not answered. 0: the engine answers, or was not observed yet."""
        watch = self._watches.get(engine_id)
        return watch.silent_seconds if watch else 0.0

    def _note(self, errors: Mapping[str, Exception]) -> None:
        for engine_id, error in errors.items():
            if repr(error) != repr(self._errors.get(engine_id)):
                logger.warning("%s cannot be reconciled, retrying", engine_id or "the engines", exc_info=error)
        self._errors = dict(errors)

    async def _look_at_memory(self, engines: Sequence[EngineRecord], observed: dict[str, Observed]) -> Memory | None:
        processes = ((each.server_id, seen.process) for each in engines if (seen := observed.get(each.id)))
        pids = {server_id: process.pid for server_id, process in processes if server_id and process and process.pid}
        return await self._memory.look(pids) if self._memory else None

    def _look(self, engines: Sequence[EngineRecord], observed: dict[str, Observed]) -> None:
        now_seconds = time.monotonic()
        active = {engine.id for engine in engines}
        for engine_id in self._watches.keys() - active:
            del self._watches[engine_id]
        self._runner.forget_all_but(active)
        for engine in engines:
            watch = self._watches.setdefault(engine.id, Watch(engine.state, now_seconds))
            watch.look(engine, observed.get(engine.id), now_seconds, self._limits.look_seconds)
            if engine.id in self._runner.signalled:
                watch.is_stop_sent = True
        self._runner.signalled.clear()
