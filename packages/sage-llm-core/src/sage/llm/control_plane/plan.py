"""The plan: a pure function that returns the actions which bring engines closer to their desired states.

It is level-triggered: each call uses only the store and the newest observations. Therefore a missed change, or an action
that is planned again, does no harm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sage.llm.client.types import DesiredState, EngineKind, EngineState, Reason, RestartPolicy
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.restarts import backoff_seconds, next_restart
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.watch import Watch

_S = EngineState


@dataclass(frozen=True)
class Limits:
    """Limits of time. A training run may take as long as it needs to start, train and stop."""

    start_seconds: float  #: for an inference engine to answer
    stop_seconds: float  #: for an inference engine to exit after SIGTERM
    unresponsive_seconds: float = 30.0  #: silence after which requests are refused; after twice the time, a restart
    look_seconds: float = 5.0  #: maximum time that counts between two observations


@dataclass(frozen=True)
class Validation:
    """The progress of the validation of an engine, and its result."""

    is_done: bool
    reason: Reason | None = None  #: why the engine cannot be started; None: it can


@dataclass(frozen=True)
class Snapshot:
    """The input of the plan."""

    engines: Sequence[EngineRecord]  #: those that are not settled, oldest first
    servers: Mapping[str, ServerRecord]  #: by id
    observed: Mapping[str, Observed]  #: by engine id; missing: not known: do not assume that its process is dead
    watches: Mapping[str, Watch]  #: by engine id
    validations: Mapping[str, Validation]  #: by engine id; missing: not begun
    limits: Limits


@dataclass(frozen=True)
class Validate:
    """Run the slow checks of an engine, outside of requests."""

    engine: EngineRecord


@dataclass(frozen=True)
class Launch:
    """Start the server of an engine, or adopt the process if it exists already."""

    engine: EngineRecord
    server: ServerRecord | None  #: None: not planned yet


@dataclass(frozen=True)
class SendSignal:
    """Send a signal to the processes of a server."""

    engine: EngineRecord
    server: ServerRecord
    signal: Signal


@dataclass(frozen=True)
class Transition:
    """Write a new state. If the engine is settled or queued again, the row of its server is removed in the same write."""

    engine: EngineRecord
    state: EngineState
    reason: Reason | None = None
    restarts: int | None = None  #: of a failure: number of the restart, queued in the same write; None: no restart


#: The observation of an engine whose state requires a process, but which has no server.
_NO_SERVER = Observed(alive=False, reason=Reason(code="server_lost", message="The engine has no process."))

Action = Validate | Launch | SendSignal | Transition


def plan(snapshot: Snapshot) -> list[Action]:
    """Return at most one action for each engine, oldest engine first; linear in the number of engines."""
    return [action for engine in snapshot.engines if (action := _next(engine, snapshot))]


def _next(engine: EngineRecord, snapshot: Snapshot) -> Action | None:
    server = snapshot.servers.get(engine.server_id or "")
    is_wanted = engine.desired is DesiredState.RUNNING
    match engine.state:
        case _S.VALIDATING | _S.QUEUED if engine.desired is DesiredState.STOPPED:
            return Transition(engine, _S.STOPPED)
        case _S.VALIDATING:
            return _validate(engine, snapshot.validations.get(engine.id))
        case _S.QUEUED:
            is_due = snapshot.watches[engine.id].state_seconds >= backoff_seconds(engine.restarts)
            return Launch(engine, None) if is_wanted and is_due else None
        case _S.STARTING if server and server.state is ServerState.PLANNED and is_wanted:
            return Launch(engine, server)
        case _S.PAUSED if server is None:
            return Transition(engine, _S.STOPPED) if engine.desired is DesiredState.STOPPED else None
        case _ if server is None:
            return _settle(engine, _NO_SERVER, snapshot)
        case _:
            return _of_process(engine, server, snapshot)


def _validate(engine: EngineRecord, validation: Validation | None) -> Action | None:
    if validation is None:
        return Validate(engine)
    if not validation.is_done:
        return None
    return Transition(engine, _S.FAILED if validation.reason else _S.QUEUED, validation.reason)


def _of_process(engine: EngineRecord, server: ServerRecord, snapshot: Snapshot) -> Action | None:
    """Plan for an engine that has, or had, a process."""
    observed, watch, limits = snapshot.observed.get(engine.id), snapshot.watches[engine.id], snapshot.limits
    kill = SendSignal(engine, server, Signal.KILL)
    is_killed = engine.force and engine.desired is DesiredState.STOPPED
    if observed is None:  # a kill is correct whether the process is alive or not
        return _stop(engine, kill) if is_killed else None
    if observed.orphaned:
        return kill
    if observed.ended and observed.alive:  # the process is about to exit; write the result afterwards
        return kill if is_killed or watch.ended_seconds > limits.stop_seconds else None
    if observed.ended or not observed.alive:
        return _settle(engine, observed, snapshot)
    if is_killed:
        return _stop(engine, kill)
    is_inference = engine.kind is not EngineKind.FINETUNE
    match engine.state:
        case _S.STOPPING if is_inference and watch.state_seconds > limits.stop_seconds:
            return kill
        case _S.STARTING | _S.RUNNING | _S.PAUSED | _S.STOPPING if engine.desired is DesiredState.STOPPED:
            return None if watch.is_stop_sent else _stop(engine, SendSignal(engine, server, Signal.STOP))
        case _S.STARTING if observed.ready:
            return Transition(engine, _S.RUNNING)
        case _S.STARTING if is_inference and watch.state_seconds > limits.start_seconds:
            return kill  # `_settle` writes the reason once the process is dead
        case _S.RUNNING if _is_hung(engine, watch, limits):
            return kill
        case _:
            return None


def _stop(engine: EngineRecord, signal: SendSignal) -> Action:
    """Write `stopping` before the signal; the next plan, even of another control plane, then sends the signal."""
    return signal if engine.state is _S.STOPPING else Transition(engine, _S.STOPPING)


def _settle(engine: EngineRecord, observed: Observed, snapshot: Snapshot) -> Action | None:
    """Plan for an engine whose process has exited."""
    watch, limits = snapshot.watches[engine.id], snapshot.limits
    match engine.state, observed.ended:
        case _S.STARTING, _S.COMPLETED:
            return Transition(engine, _S.RUNNING)  # it completed before it was observed running; the next plan settles it
        case _S.PAUSED, _S.COMPLETED:
            return Transition(engine, _S.STOPPING)
        case _S.STOPPING, None:
            return Transition(engine, _S.STOPPED)
        case _S.STOPPING, _S.FAILED if engine.force:  # not STOPPED, because a stopped run has a result
            message = "It was killed, as requested; the steps since its last checkpoint are lost."
            hint = observed.reason.hint if observed.reason else ""
            return Transition(engine, _S.FAILED, Reason(code="killed", message=message, hint=hint))
        case _, _S.STOPPED | _S.COMPLETED as ended:
            return Transition(engine, ended, observed.reason)
        case _:
            restarts = next_restart(engine, observed, watch) if engine.state is not _S.STOPPING else None
            reason = _reason_of_kill(engine, watch, limits) or observed.reason
            return Transition(engine, _S.FAILED, reason, restarts=restarts)


def _is_hung(engine: EngineRecord, watch: Watch, limits: Limits) -> bool:
    """Return whether a running engine must be restarted because it no longer answers."""
    is_allowed = engine.restart_policy is not RestartPolicy.NO and engine.desired is DesiredState.RUNNING
    return is_allowed and watch.silent_seconds > 2 * limits.unresponsive_seconds


def _reason_of_kill(engine: EngineRecord, watch: Watch, limits: Limits) -> Reason | None:
    """Return why the control plane killed an engine; None if the engine exited for another reason."""
    is_inference = engine.kind is not EngineKind.FINETUNE
    if engine.state is _S.STARTING and is_inference and watch.state_seconds > limits.start_seconds:
        message = f"The engine did not answer within {limits.start_seconds:.0f} s and was killed."
        hint = f"`sage llm engine logs {engine.id}` shows its progress; SAGE_ENGINE_START_SECONDS sets the limit."
        return Reason(code="start_timeout", message=message, hint=hint)
    if engine.state is _S.RUNNING and _is_hung(engine, watch, limits):
        message = f"The engine did not answer for {watch.silent_seconds:.0f} s and was killed."
        hint = f"`sage llm engine logs {engine.id}` shows its log."
        return Reason(code="engine_unresponsive", message=message, hint=hint)
    return None
