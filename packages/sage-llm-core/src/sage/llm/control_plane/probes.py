"""The prober observes engines in the background, and stores the last observation of each engine.

A probe is one attempt to observe an engine.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sage.common.errors import first_line
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.executors.base import Executor, Observed
from sage.llm.control_plane.launchers.base import Launcher, ProcessObservation
from sage.llm.control_plane.sleeping import is_asleep
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.store.servers import HOSTED

logger = logging.getLogger(__name__)
#: Seconds between two probes of an engine. The first value applies to engines that start or stop, and to training runs
#: whose checkpoints or results are served. The second value applies to all other engines.
_FAST_SECONDS, _SLOW_SECONDS = 0.2, 1.0
_TIMEOUT_SECONDS = 5.0
#: Each probe belongs to a lane. This is the maximum number of concurrent probes in one lane. Servers that do not answer have
#: a separate lane, so that their probes do not delay the probes of other servers.
_MAX_PROBES = 64
_CHANGING = (EngineState.STARTING, EngineState.STOPPING)


@dataclass
class _Target:
    engine: EngineRecord
    server: ServerRecord
    is_first: bool = True  #: True: only this engine reports the memory of the server's process
    observed: Observed | None = None
    observed_at_seconds: float = 0.0
    due_seconds: float = 0.0
    is_answering: bool = False  #: True: the last probe found the engine ready
    trouble: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def lane(self) -> str:
        """The name of the lane in which the engine is probed. A probe waits only for other probes of the same lane."""
        if self.engine.state in _CHANGING:
            return "changing"
        return "answering" if self.is_answering else "silent"


class Prober:
    """Probes every engine that has a server."""

    def __init__(
        self,
        executors: Mapping[EngineKind, Executor],
        launcher: Launcher,
        on_change: Callable[[], None],
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> None:
        """on_change: called after the first observation of an engine, and whenever the condition of an engine changes."""
        self._executors, self._launcher, self._on_change = executors, launcher, on_change
        self._timeout_seconds = timeout_seconds
        self._targets: dict[str, _Target] = {}
        self._lanes = {lane: asyncio.Semaphore(_MAX_PROBES) for lane in ("changing", "answering", "silent")}
        self._looks: set[asyncio.Task[Mapping[str, ProcessObservation]]] = set()
        self._changed = asyncio.Event()

    def watch(self, engines: Iterable[EngineRecord], servers: Mapping[str, ServerRecord]) -> None:
        """Set the engines to probe. If the server of an engine has changed, discard the last observation of the engine."""
        targets, seen = {}, set[str]()
        for engine in engines:
            server = servers.get(engine.server_id or "")
            if server and (engine.state in HOSTED or is_asleep(engine, server)):
                known = self._targets.get(engine.id)
                if known is None or known.server != server:
                    self._cancel(known)
                    known = _Target(engine, server)
                    self._changed.set()
                elif known.engine.state is not engine.state:
                    known.due_seconds = 0.0
                    self._changed.set()
                known.engine, known.is_first = engine, server.id not in seen
                seen.add(server.id)
                targets[engine.id] = known
        for engine_id in self._targets.keys() - targets.keys():
            self._cancel(self._targets[engine_id])
        self._targets = targets

    def observed(self) -> dict[str, Observed]:
        """Return the last observation of each engine. Engines without a recent observation are missing."""
        oldest_seconds = time.monotonic() - _SLOW_SECONDS - 2 * self._timeout_seconds
        return {
            engine_id: target.observed
            for engine_id, target in self._targets.items()
            if target.observed and target.observed_at_seconds >= oldest_seconds
        }

    def last(self, engine_id: str) -> Observed | None:
        """Return the last observation of an engine, even if the observation is old. None: there is no observation."""
        target = self._targets.get(engine_id)
        return target.observed if target else None

    def trouble(self, engine_id: str) -> str:
        """Return why the last probe of an engine failed, or "" if the probe succeeded."""
        target = self._targets.get(engine_id)
        return target.trouble if target else ""

    async def run(self) -> None:
        """Probe the engines until cancelled."""
        while True:
            self._changed.clear()
            now_seconds = time.monotonic()
            due = [target for target in self._targets.values() if not target.task and target.due_seconds <= now_seconds]
            if due:
                self._begin(due)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAST_SECONDS):
                    await self._changed.wait()

    async def close(self) -> None:
        """Cancel all probes."""
        tasks = [*self._looks, *(target.task for target in self._targets.values() if target.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, due: list[_Target]) -> None:
        look = asyncio.create_task(self._observe({target.server.handle for target in due}))
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)
        for target in due:
            target.task = asyncio.create_task(self._probe(target, look))
            target.task.add_done_callback(functools.partial(self._done, target))

    async def _observe(self, handles: set[str]) -> Mapping[str, ProcessObservation]:
        async with asyncio.timeout(self._timeout_seconds):
            return await self._launcher.observe(handles)

    async def _probe(self, target: _Target, look: asyncio.Task[Mapping[str, ProcessObservation]]) -> None:
        engine, server = target.engine, target.server
        try:
            process = (await asyncio.shield(look)).get(server.handle)
            if process is None:
                raise OSError(f"the process of {server.id} cannot be observed")
            if not target.is_first:
                process = dataclasses.replace(process, memory_bytes=None)
            async with self._lanes[target.lane], asyncio.timeout(self._timeout_seconds):
                observed = await self._executors[engine.kind].probe(engine, server, process)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            self._fail(target, error)
        else:
            self._keep(target, observed)

    def _keep(self, target: _Target, observed: Observed) -> None:
        before, target.observed = target.observed, observed
        target.observed_at_seconds, target.trouble = time.monotonic(), ""
        target.is_answering = observed.ready
        if before is None or _outline(before) != _outline(observed):
            self._on_change()

    def _fail(self, target: _Target, error: Exception) -> None:
        target.is_answering = False
        trouble = f"{type(error).__name__}: {first_line(error)}"
        if target.trouble != trouble:
            target.trouble = trouble
            logger.warning("%s: the engine cannot be observed, retrying", target.engine.id, exc_info=error)

    def _done(self, target: _Target, _: asyncio.Task[None]) -> None:
        target.task = None
        # Training runs that are served are probed often, so that new checkpoints are found soon.
        is_fast = target.engine.state in _CHANGING or target.engine.serve is not None
        target.due_seconds = time.monotonic() + (_FAST_SECONDS if is_fast else _SLOW_SECONDS)

    @staticmethod
    def _cancel(target: _Target | None) -> None:
        if target and target.task:
            target.task.cancel()


def _outline(observed: Observed) -> tuple[object, ...]:
    checkpoint_step = observed.training and observed.training.checkpoint_step
    is_serving = observed.alive, observed.ready, observed.models, observed.is_active
    return *is_serving, observed.ended, observed.orphaned, checkpoint_step
