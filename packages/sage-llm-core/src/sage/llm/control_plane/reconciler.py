"""The one loop that brings what is to what is wanted: observe, decide, act, write down.

It is level-triggered: each tick starts from what the store and the world say now, so it does not matter what was missed,
by whom, or how often a tick is repeated.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sage.common.errors import SageError
from sage.llm.client.types import EngineKind, EngineState, Reason, Wanted
from sage.llm.control_plane.executors.base import Executor, Observed
from sage.llm.control_plane.store.store import EngineRecord, StaleWrite, Store
from sage.llm.control_plane.watch import Watch

logger = logging.getLogger(__name__)
_ACTOR = "reconciler"
#: A tick waits this long for its steps; slower ones go on beside the next ticks.
_TICK_SECONDS = 0.1
#: Steps under way have this long to write down what they did before the control plane is closed.
_CLOSE_SECONDS = 10.0
#: What the errors of the loop itself, not of one engine, are remembered under.
_LOOP = "the loop"
_S = EngineState


class Effect(Enum):
    """What is done to the world before the store is told."""

    NOTHING = auto()
    LAUNCH = auto()
    ADOPT = auto()
    STOP = auto()
    KILL = auto()


@dataclass(frozen=True)
class Action:
    """The next thing to do for an engine."""

    effect: Effect = Effect.NOTHING
    state: EngineState | None = None  #: then write this down
    reason: Reason | None = None


@dataclass(frozen=True)
class Limits:
    """How long an inference engine may take; a training run may take as long as it needs."""

    start_seconds: float
    stop_seconds: float
    look_seconds: float = 5.0  #: between two looks, no more time than this counts
    resume: bool = False  #: engines that are found dead at the first look are queued again


def decide(engine: EngineRecord, observed: Observed, watch: Watch, limits: Limits) -> Action:
    """Return the next action for an engine; never waits, never touches the world."""
    if observed.orphaned:
        return Action(Effect.KILL)
    if observed.ended and observed.alive:  # its process is about to leave; what counts is written when it has
        is_stuck = engine.wanted is Wanted.KILLED or watch.ended_seconds > limits.stop_seconds
        return Action(Effect.KILL) if is_stuck else Action()
    is_inference = engine.kind is not EngineKind.FINETUNE
    is_late = is_inference and watch.state_seconds > limits.start_seconds
    if engine.state is _S.QUEUED:
        return _start(engine, observed)
    if observed.ended or not observed.alive:
        return _settle(engine, observed, _timeout(limits) if is_late else None)
    match engine.state, engine.wanted:
        case _S.STOPPING, Wanted.KILLED:
            return Action(Effect.KILL)
        case _S.STOPPING, _ if is_inference and watch.state_seconds > limits.stop_seconds:
            return Action(Effect.KILL)
        case _S.STARTING | _S.RUNNING, Wanted.KILLED:
            return Action(Effect.KILL, _S.STOPPING)
        case _S.STARTING | _S.RUNNING, Wanted.STOPPED:
            return Action(Effect.STOP, _S.STOPPING)
        case _S.STARTING, _ if observed.ready:
            return Action(state=_S.RUNNING)
        case _S.STARTING, _ if is_late:
            return Action(Effect.KILL)  # `_settle` says so when it is dead
        case _:
            return Action()


def _start(engine: EngineRecord, observed: Observed) -> Action:
    """Decide for one that is queued; one that lives already is one whose launch was not written down."""
    if engine.wanted is not Wanted.RUNNING and not observed.alive:
        return Action(state=_S.STOPPED)
    return Action(Effect.ADOPT if observed.alive else Effect.LAUNCH, _S.STARTING)


def _settle(engine: EngineRecord, observed: Observed, timeout: Reason | None) -> Action:
    """Decide for one whose process is gone."""
    match engine.state, observed.ended:
        case _S.STARTING, _S.COMPLETED:
            return Action(state=_S.RUNNING)  # it was quick; the next tick settles it
        case _S.STOPPING, None:
            return Action(state=_S.STOPPED)
        case _S.STOPPING, _S.FAILED if engine.wanted is Wanted.KILLED:  # not stopped: that has a result
            message = "It was killed, as asked; the steps since its last checkpoint are lost."
            hint = observed.reason.hint if observed.reason else ""
            return Action(state=_S.FAILED, reason=Reason(code="killed", message=message, hint=hint))
        case _S.STARTING, None if timeout:
            return Action(state=_S.FAILED, reason=timeout)
        case _S.STARTING | _S.RUNNING | _S.STOPPING, ended:
            return Action(state=ended or _S.FAILED, reason=observed.reason)
        case _:
            return Action()


def _timeout(limits: Limits) -> Reason:
    message = f"The engine did not answer within {limits.start_seconds:.0f} s and was killed."
    hint = "Its log says how far it came; SAGE_ENGINE_START_SECONDS sets the limit."
    return Reason(code="start_timeout", message=message, hint=hint)


class Reconciler:
    """Runs `decide` for every engine that something may happen to, in a task for each; one holds up no other."""

    def __init__(
        self, store: Store, executors: Mapping[EngineKind, Executor], limits: Limits, lease: str | None = None
    ) -> None:
        """lease: write only as long as it is held."""
        self._store, self._executors, self._limits, self._lease = store, executors, limits, lease
        self._steps: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, Watch] = {}
        #: What launching an engine of a version gave, so that it is launched once, however often writing it down fails.
        self._launched: dict[str, tuple[int, int | None]] = {}
        self._troubles: dict[str, str] = {}

    async def tick(self) -> None:
        """Take every engine one step, except those whose last step is under way; raises nothing."""
        try:
            engines = await asyncio.to_thread(self._store.list, active_only=True)
        except Exception as error:  # noqa: BLE001 - told, and tried again
            self._report(_LOOP, error)
            return
        self._forget_all_but({engine.id for engine in engines})
        for engine in engines:
            if engine.id not in self._steps:
                self._steps[engine.id] = step = asyncio.create_task(self._guarded_step(engine))
                step.add_done_callback(functools.partial(self._done, engine.id))
        if self._steps:
            await asyncio.wait(list(self._steps.values()), timeout=_TICK_SECONDS)

    async def close(self) -> None:
        """Wait for the steps under way."""
        if self._steps:
            await asyncio.wait(list(self._steps.values()), timeout=_CLOSE_SECONDS)

    def silent_seconds(self, engine_id: str) -> float:
        """Return how long a running inference engine has not answered; 0 if it answers, or is not watched."""
        watch = self._watches.get(engine_id)
        return watch.silent_seconds if watch else 0.0

    async def _guarded_step(self, engine: EngineRecord) -> None:
        try:
            await self._step(engine)
        except StaleWrite:
            logger.debug("%s was changed by someone else; the next tick decides anew", engine.id)
        except Exception as error:  # noqa: BLE001 - told, and tried again; one engine's trouble is not another's
            self._report(engine.id, error)
        else:
            self._troubles.pop(engine.id, None)

    async def _step(self, engine: EngineRecord) -> None:
        executor, is_first_look = self._executors[engine.kind], engine.id not in self._watches
        observed = await executor.observe(engine)
        action = decide(engine, observed, self._look(engine, observed), self._limits)
        values: dict[str, int | None] = {}
        try:
            values = await self._act(executor, engine, action.effect)
        except (SageError, OSError) as error:
            if action.effect is not Effect.LAUNCH:
                raise
            action = Action(state=_S.FAILED, reason=_reason(error))
        await self._write(engine, action, **values)
        if self._limits.resume and is_first_look and (engine.wanted, action.state) == (Wanted.RUNNING, _S.FAILED):
            failed = await asyncio.to_thread(self._store.get, engine.id)
            await self._write(failed, Action(state=_S.QUEUED))

    def _look(self, engine: EngineRecord, observed: Observed) -> Watch:
        now, is_inference = time.monotonic(), engine.kind is not EngineKind.FINETUNE
        watch = self._watches.setdefault(engine.id, Watch(engine.state, now))
        is_silent = is_inference and engine.state is _S.RUNNING and observed.alive and not observed.ready
        watch.look(now, engine.state, self._limits.look_seconds, silent=is_silent, ended=observed.ended is not None)
        return watch

    async def _act(self, executor: Executor, engine: EngineRecord, effect: Effect) -> dict[str, int | None]:
        match effect:
            case Effect.LAUNCH:
                if self._launched.get(engine.id, (None, None))[0] != engine.version:
                    self._launched[engine.id] = engine.version, await executor.launch(engine)
                return {"port": self._launched[engine.id][1]}
            case Effect.ADOPT:
                return {"port": await executor.port(engine)}
            case Effect.STOP:
                await executor.request_stop(engine, force=False)
            case Effect.KILL:
                await executor.request_stop(engine, force=True)
            case Effect.NOTHING:
                pass
        return {}

    async def _write(self, engine: EngineRecord, action: Action, **values: int | None) -> None:
        if action.state is None:
            return
        move = functools.partial(self._store.move, engine, action.state, _ACTOR, action.reason, self._lease, **values)
        await asyncio.to_thread(move)
        logger.info("%s: %s → %s%s", engine.id, engine.state, action.state,
                    f": {action.reason.message}" if action.reason else "")  # fmt: skip

    def _done(self, engine_id: str, _: asyncio.Task[None]) -> None:
        self._steps.pop(engine_id, None)

    def _forget_all_but(self, active: set[str]) -> None:
        self._troubles.pop(_LOOP, None)
        kept = active | set(self._steps)
        memories: tuple[dict[str, Any], ...] = (self._watches, self._launched, self._troubles)
        for memory in memories:
            for engine_id in memory.keys() - kept:
                del memory[engine_id]

    def _report(self, name: str, error: Exception) -> None:
        """Log an error, once for as long as it stays the same."""
        if self._troubles.get(name) != repr(error):
            self._troubles[name] = repr(error)
            logger.warning("%s: this look failed; the next one tries again", name, exc_info=error)


def _reason(error: SageError | OSError) -> Reason:
    if isinstance(error, SageError):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    return Reason(code="launch_failed", message=f"The engine could not be started: {error}.")
