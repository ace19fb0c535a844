"""The plan: a pure function that returns the actions which bring engines closer to their desired states.

Each call uses only the current records and the newest observations, so a missed change or a repeated action does no harm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sage.llm.client.types import DesiredState, EngineKind, EngineState, Reason, RestartPolicy
from sage.llm.control_plane.actions import Action, Join, Launch, SendSignal, SetDesired, Sleep, Transition, Validate, Wake
from sage.llm.control_plane.adapters import has_joined, is_misplaced, keep, leave, load, unload
from sage.llm.control_plane.admission import Refuse, Start
from sage.llm.control_plane.cores import Cores, with_threads
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.hosting import Hosts
from sage.llm.control_plane.idle import idle_change, is_stopping, reason_of_stop, state_without_process
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.merging import is_draining, must_unload, next_merge, stop_merger
from sage.llm.control_plane.queueing import Memory, Queue, queue_of
from sage.llm.control_plane.restarts import is_repeated, next_restart, next_try, not_restarted
from sage.llm.control_plane.served_run import due
from sage.llm.control_plane.sleeping import sleeps
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.watch import Watch

_S = EngineState


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds. No limit applies while a training run starts, trains or saves its result."""

    start_seconds: float  #: maximum time that an inference engine can be in state `starting`
    #: Maximum time that an inference engine can be in state `stopping`. This is also the maximum time from the end of a
    #: training run until the run's process exits.
    stop_seconds: float
    #: If an engine does not answer health checks for this time, requests to the engine are refused. After twice this time,
    #: the engine is restarted, unless its restart policy is `no`.
    unresponsive_seconds: float = 30.0
    look_seconds: float = 5.0  #: maximum time that one observation adds to the durations in an engine's Watch


@dataclass(frozen=True)
class Validation:
    """The progress and the result of an engine's validation."""

    is_done: bool
    reason: Reason | None = None  #: why the engine cannot be started; None: no problem was found
    values: Mapping[str, Any] = field(default_factory=dict)  #: results to store in the engine's record, by column name


@dataclass(frozen=True)
class Snapshot:
    """The input of the plan."""

    engines: Sequence[EngineRecord]  #: the engines that are not stopped, completed or failed, oldest first
    servers: Mapping[str, ServerRecord]  #: by server id
    observed: Mapping[str, Observed]  #: by engine id; no entry: the state of the engine's process is not known
    watches: Mapping[str, Watch]  #: by engine id
    validations: Mapping[str, Validation]  #: by engine id; no entry: the engine's validation has not begun
    limits: Limits
    memory: Memory | None = None  #: None: the devices are not known, so each engine can start
    cores: Cores | None = None  #: None: each program uses its default number of threads


#: The observation of an engine that should have a process, but has no server.
_NO_SERVER = Observed(alive=False, reason=Reason(code="server_lost", message="The engine has no process."))


def plan(snapshot: Snapshot) -> list[Action]:
    """Return at most one action for each engine, oldest engine first."""
    return decide(snapshot)[0]


def decide(snapshot: Snapshot) -> tuple[list[Action], Queue]:
    """Return the actions of the plan, and the queue from which they were derived."""
    hosts = Hosts(snapshot.engines, snapshot.servers, snapshot.observed)
    queue = queue_of(snapshot.engines, snapshot.servers.values(), snapshot.watches, hosts, snapshot.memory)
    actions: list[Action] = []
    for engine in snapshot.engines:
        try:
            action = _next(engine, snapshot, hosts, queue)
        except Exception as error:  # noqa: BLE001 - the reconciler logs the errors
            queue.errors[engine.id] = error
        else:
            actions += [action] if action else []
    return with_threads(actions, snapshot.servers.values(), snapshot.cores) if snapshot.cores else actions, queue


def _next(engine: EngineRecord, snapshot: Snapshot, hosts: Hosts, queue: Queue) -> Action | None:
    server = snapshot.servers.get(engine.server_id or "")
    is_wanted = engine.desired is DesiredState.RUNNING
    if change := idle_change(engine, snapshot.watches[engine.id]) or stop_merger(engine, hosts.engines):
        return change
    if engine.id in queue.pauses and is_wanted:
        return SetDesired(engine, DesiredState.PAUSED, paused_by=queue.pauses[engine.id])
    match engine.state:
        case _S.VALIDATING | _S.QUEUED if engine.desired is DesiredState.STOPPED:
            return Transition(engine, _S.STOPPED)
        case _S.VALIDATING:
            return _validate(engine, snapshot.validations.get(engine.id))
        case _S.QUEUED if engine.desired is DesiredState.PAUSED:
            return Transition(engine, _S.PAUSED, reason_of_stop(engine))
        case _S.QUEUED:
            return _place(engine, server, queue)
        case _S.STARTING if server and server.state is ServerState.PLANNED and is_wanted:
            return Launch(engine, server) if hosts.is_launcher(engine) else None
        case _S.PAUSED:  # a paused engine has no process
            return _of_paused(engine, queue)
        case _ if server is None:
            return _settle(engine, None, _NO_SERVER, snapshot)
        case _:
            return _of_process(engine, server, snapshot, hosts)


def _of_paused(engine: EngineRecord, queue: Queue) -> Action | None:
    match engine.desired:
        case DesiredState.RUNNING:
            return Transition(engine, _S.QUEUED)
        case DesiredState.STOPPED:
            return Transition(engine, _S.STOPPED)
        case DesiredState.PAUSED:  # an engine that was paused for another engine resumes when enough memory is free
            may_return = engine.id in queue.joins or isinstance(queue.decisions.get(engine.id), Start)
            return SetDesired(engine, DesiredState.RUNNING) if may_return else None


def _place(engine: EngineRecord, last_server: ServerRecord | None, queue: Queue) -> Action | None:
    if server := queue.joins.get(engine.id):
        return Join(engine, server)
    match queue.decisions.get(engine.id):
        case Start(_, memory_bytes) if asleep := queue.wakes.get(engine.id):
            return Join(engine, asleep, (asleep.reserved_bytes or 0) + memory_bytes)
        case Start(devices, memory_bytes):
            reserved_bytes = None if engine.reserved_bytes is None else memory_bytes
            return Launch(engine, None, last_server is not None, devices or None, reserved_bytes)
        case Refuse():
            return Transition(engine, _S.FAILED, queue.reason(engine))
        case _:
            return None


def _validate(engine: EngineRecord, validation: Validation | None) -> Action | None:
    if validation is None:
        return Validate(engine)
    if not validation.is_done:
        return None
    state = _S.FAILED if validation.reason else _S.QUEUED
    return Transition(engine, state, validation.reason, values=validation.values)


def _of_process(engine: EngineRecord, server: ServerRecord, snapshot: Snapshot, hosts: Hosts) -> Action | None:
    observed, watch, limits = snapshot.observed.get(engine.id), snapshot.watches[engine.id], snapshot.limits
    is_last = hosts.is_last(engine)
    kill = SendSignal(engine, server, Signal.KILL, closes=is_last)
    is_killed = engine.force and engine.desired is DesiredState.STOPPED
    if observed is None:  # the process is possibly alive; a signal to an exited process does no harm
        return _stop(engine, kill if is_last else leave(engine)) if is_killed else None
    if observed.orphaned:
        return kill
    if not is_killed and (publish := due(engine, observed)):
        return publish
    if observed.ended and observed.alive:  # the process is about to exit; the result is stored after the exit
        return kill if is_killed or watch.ended_seconds > limits.stop_seconds else None
    if observed.ended or not observed.alive:
        return _settle(engine, server, observed, snapshot)
    if is_stopping(engine):
        return _end(engine, server, observed, snapshot, is_last=is_last, is_killed=is_killed)
    match engine.state:
        case _S.STARTING:
            return _start(engine, server, observed, snapshot, hosts)
        case _S.RUNNING if _is_hung(engine, watch, limits):
            return kill
        case _S.RUNNING if observed.ready and server.shared:
            merge = next_merge(engine, server, hosts.engines, snapshot.servers, snapshot.observed)
            return keep(engine, server, observed, hosts, snapshot.watches) or merge
        case _:
            return None


def _end(
    engine: EngineRecord, server: ServerRecord, observed: Observed, snapshot: Snapshot, *, is_last: bool, is_killed: bool
) -> Action | None:
    watch, stop_seconds = snapshot.watches[engine.id], snapshot.limits.stop_seconds
    is_late = engine.state is _S.STOPPING and _is_inference(engine) and watch.state_seconds > stop_seconds
    is_forced = is_killed or is_late
    if engine.state is _S.STOPPING and not is_forced and is_draining(engine, watch):
        return None
    if not is_last:
        return _stop(engine, leave(engine) if is_forced else unload(engine, server, observed))
    if must_unload(engine, observed) and not is_killed:
        return _stop(engine, unload(engine, server, observed))
    if is_forced:
        return _stop(engine, SendSignal(engine, server, Signal.KILL, closes=True))
    if sleeps(engine, server):
        return _stop(engine, Sleep(engine, server))
    return None if watch.is_stop_sent else _stop(engine, SendSignal(engine, server, Signal.STOP, closes=True))


def _start(
    engine: EngineRecord, server: ServerRecord, observed: Observed, snapshot: Snapshot, hosts: Hosts
) -> Action | None:
    is_last = hosts.is_last(engine)
    kill = SendSignal(engine, server, Signal.KILL, closes=is_last)  # after the exit, `_settle` stores why the start failed
    if is_misplaced(engine, server):
        return kill if is_last else _settle(engine, server, observed, snapshot)
    action: Action | None
    if server.state is ServerState.WAKING:
        action = Wake(engine, server) if hosts.is_launcher(engine) else None
    else:
        action = load(engine, server, observed) if observed.ready else None
    is_late = _is_inference(engine) and snapshot.watches[engine.id].state_seconds > snapshot.limits.start_seconds
    if is_late and not isinstance(action, Transition):
        is_usable = hosts.is_serving_others(engine) or (observed.ready and not is_last)
        return _settle(engine, server, observed, snapshot) if is_usable else kill
    return action


def _stop(engine: EngineRecord, action: Action) -> Action:
    """Return `action` if the engine is in state `stopping`, else the transition to `stopping`.

    After the transition, the next plan returns `action`, even if another control plane has taken over.
    """
    return action if engine.state is _S.STOPPING else Transition(engine, _S.STOPPING, reason_of_stop(engine))


def _settle(engine: EngineRecord, server: ServerRecord | None, observed: Observed, snapshot: Snapshot) -> Action | None:
    """Return the action for an engine whose process has exited, or whose start on a shared server has failed."""
    watch, limits = snapshot.watches[engine.id], snapshot.limits
    match engine.state, observed.ended:
        case _S.STARTING, _S.COMPLETED:
            return Transition(engine, _S.RUNNING)  # the run has completed already, so the next plan sets `completed`
        case _S.STOPPING, None:
            return Transition(engine, state_without_process(engine), reason_of_stop(engine))
        case _S.RUNNING, None if engine.desired is DesiredState.PAUSED:  # the process exited before it was stopped
            return Transition(engine, _S.PAUSED, reason_of_stop(engine))
        case _, _S.STOPPED if engine.desired is DesiredState.PAUSED:  # the training run saved a checkpoint before it stopped
            return Transition(engine, _S.PAUSED, reason_of_stop(engine))
        case _S.STOPPING, _S.FAILED if engine.force:  # the new state is not `stopped`, because a killed run has no result
            message = "The run was killed, as requested. The steps since its last checkpoint are lost."
            hint = observed.reason.hint if observed.reason else ""
            return Transition(engine, _S.FAILED, Reason(code="killed", message=message, hint=hint))
        case _, _S.STOPPED | _S.COMPLETED as ended:
            return Transition(engine, ended, observed.reason)
        case _:
            return _fail(engine, server, observed, watch, limits)


def _fail(engine: EngineRecord, server: ServerRecord | None, observed: Observed, watch: Watch, limits: Limits) -> Transition:
    if is_misplaced(engine, server):
        message = f"The shared server refused the adapter, so the engine gets a separate server ({engine.form})."
        refused = Reason(code="adapter_refused", message=message)
        return Transition(engine, _S.FAILED, refused, restarts=engine.restarts, must_remain=observed.alive)
    reason = _reason_of_kill(engine, watch, limits, is_alive=observed.alive) or observed.reason
    is_woken = server is not None and server.state is ServerState.WAKING
    if engine.state is _S.STARTING and not observed.alive and (is_woken or has_joined(engine, server)):
        restarts = next_try(engine)
    else:
        restarts = next_restart(engine, observed, watch) if engine.state is not _S.STOPPING else None
    if restarts and is_repeated(engine, observed):
        restarts, reason = None, not_restarted(reason)
    values = {"last_crash": observed.crash} if observed.crash else {}
    return Transition(engine, _S.FAILED, reason, restarts=restarts, must_remain=observed.alive, values=values)


def _is_hung(engine: EngineRecord, watch: Watch, limits: Limits) -> bool:
    is_allowed = engine.restart_policy is not RestartPolicy.NO and engine.desired is DesiredState.RUNNING
    return is_allowed and watch.silent_seconds > 2 * limits.unresponsive_seconds


def _reason_of_kill(engine: EngineRecord, watch: Watch, limits: Limits, *, is_alive: bool) -> Reason | None:
    if engine.state is _S.STARTING and _is_inference(engine) and watch.state_seconds > limits.start_seconds:
        problem = "engine's server did not load the adapter" if engine.adapter else "engine did not answer"
        message = f"The {problem} within {limits.start_seconds:.0f} s{'' if is_alive else ' and was killed'}."
        hint = f"`sage llm engine logs {engine.id}` shows the engine's log; SAGE_ENGINE_START_SECONDS sets the limit."
        return Reason(code="start_timeout", message=message, hint=hint)
    if engine.state is _S.RUNNING and _is_hung(engine, watch, limits):
        message = f"The engine did not answer for {watch.silent_seconds:.0f} s and was killed."
        hint = f"`sage llm engine logs {engine.id}` shows the engine's log."
        return Reason(code="engine_unresponsive", message=message, hint=hint)
    return None


def _is_inference(engine: EngineRecord) -> bool:
    return engine.kind is not EngineKind.FINETUNE
