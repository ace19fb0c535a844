"""The one loop that brings what is to what is wanted: observe, decide, act, write down.

It is level-triggered: each tick starts from what the store and the world say now, so it does not matter what was missed,
by whom, or how often a tick is repeated.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from sage.common.errors import SageError
from sage.llm.control_plane.executors.base import Executor, Observed
from sage.llm.control_plane.states import EngineState
from sage.llm.control_plane.store.store import EngineRecord, StaleWrite, Store
from sage.llm.control_plane.types import EngineKind, Reason, Wanted

logger = logging.getLogger(__name__)
_ACTOR = "reconciler"
_S = EngineState


class Effect(Enum):
    """What is done to the world before the store is told."""

    NOTHING = auto()
    LAUNCH = auto()
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


def decide(engine: EngineRecord, observed: Observed, limits: Limits) -> Action:
    """Return the next action for an engine; never waits, never touches the world."""
    is_inference = engine.kind is not EngineKind.FINETUNE
    match engine.state, engine.wanted:
        case _S.QUEUED, Wanted.STOPPED if not observed.alive:
            return Action(state=_S.STOPPED)
        case _S.QUEUED, _:  # one that lives already, because its launch was not written down, is adopted by `launch`
            return Action(Effect.LAUNCH, _S.STARTING)
        case _S.STARTING | _S.RUNNING | _S.STOPPING, _ if observed.ended:
            if engine.state is _S.STARTING and observed.ended is _S.COMPLETED:
                return Action(state=_S.RUNNING)  # it was quick; the next tick settles it
            return Action(state=observed.ended, reason=observed.reason)
        case _S.STOPPING, _ if not observed.alive:
            return Action(state=_S.STOPPED)
        case _S.STOPPING, _ if is_inference and engine.state_seconds > limits.stop_seconds:
            return Action(Effect.KILL)
        case _S.STARTING | _S.RUNNING, _ if not observed.alive:
            return Action(state=_S.FAILED, reason=observed.reason)
        case _S.STARTING | _S.RUNNING, Wanted.STOPPED:
            return Action(Effect.STOP, _S.STOPPING)
        case _S.STARTING, _ if observed.ready:
            return Action(state=_S.RUNNING)
        case _S.STARTING, _ if is_inference and engine.state_seconds > limits.start_seconds:
            message = f"The engine did not answer within {limits.start_seconds:.0f} s and was killed."
            hint = "Its log says how far it came; SAGE_ENGINE_START_SECONDS sets the limit."
            return Action(Effect.KILL, _S.FAILED, Reason(code="start_timeout", message=message, hint=hint))
        case _:
            return Action()


class Reconciler:
    """Runs `decide` for every engine that something may happen to."""

    def __init__(self, store: Store, executors: Mapping[EngineKind, Executor], limits: Limits) -> None:
        self._store, self._executors, self._limits = store, executors, limits

    async def tick(self) -> None:
        """Take every engine one step; what goes wrong with one does not keep the others."""
        engines = await asyncio.to_thread(self._store.list, active_only=True)
        await asyncio.gather(*(self._step(engine) for engine in engines))

    async def _step(self, engine: EngineRecord) -> None:
        try:
            executor = self._executors[engine.kind]
            action = decide(engine, await executor.observe(engine), self._limits)
            values = await self._act(executor, engine, action.effect)
            await self._write(engine, action, **values)
        except StaleWrite:
            logger.debug("%s was changed by someone else; the next tick decides anew", engine.id)
        except (SageError, OSError) as error:
            with contextlib.suppress(StaleWrite):
                await self._write(engine, Action(state=_S.FAILED, reason=_reason(error)))
        except Exception:
            logger.exception("%s: this tick failed; the next one tries again", engine.id)

    async def _act(self, executor: Executor, engine: EngineRecord, effect: Effect) -> dict[str, int | None]:
        match effect:
            case Effect.LAUNCH:
                return {"port": await executor.launch(engine)}
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
        await asyncio.to_thread(self._store.move, engine, action.state, _ACTOR, action.reason, **values)
        logger.info("%s: %s → %s%s", engine.id, engine.state, action.state,
                    f": {action.reason.message}" if action.reason else "")  # fmt: skip


def _reason(error: SageError | OSError) -> Reason:
    if isinstance(error, SageError):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    return Reason(code="launch_failed", message=f"The engine could not be started: {error}.")
