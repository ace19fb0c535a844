"""Restarts by policy: which engines are restarted automatically, when, and how often."""

from sage.llm.client.types import DesiredState, EngineState, Reason, RestartPolicy
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.watch import Watch

_MAX_BACKOFF_SECONDS = 60.0
#: If an engine fails after it was in state `running` for this time, the count of its restarts begins at zero again.
_HEALTHY_SECONDS = 600.0
#: Reason code of a run whose process exited without reporting an error.
_EXITED_WITHOUT_REPORT = "worker_died"


def backoff_seconds(restarts: int) -> float:
    """Return the seconds to wait: 0 before the first start, 1 before the first restart, then 2, 4, …, at most 60."""
    return min(2.0 ** (restarts - 1), _MAX_BACKOFF_SECONDS) if restarts else 0.0


def next_restart(engine: EngineRecord, observed: Observed, watch: Watch) -> int | None:
    """Return an engine's new restart count after its process has exited, or None if the engine stays failed.

    A training run that reported its failure (such as a NaN loss) stays failed, because a restart would fail again.
    """
    has_reported = (
        observed.ended is EngineState.FAILED and observed.reason and observed.reason.code != _EXITED_WITHOUT_REPORT
    )
    if engine.desired is not DesiredState.RUNNING or has_reported:
        return None
    match engine.restart_policy:
        case RestartPolicy.NO:
            return None
        case RestartPolicy.ON_FAILURE if not watch.seen_alive:  # the process ended before this control plane observed it
            return None
    is_healthy = engine.state is EngineState.RUNNING and watch.state_seconds >= _HEALTHY_SECONDS
    restarts = 0 if is_healthy else engine.restarts
    return restarts + 1 if restarts < engine.max_restarts else None


def is_repeated(engine: EngineRecord, observed: Observed) -> bool:
    """Return whether a training run has crashed twice in a row at the same point. Such a run is not restarted."""
    return observed.crash is not None and observed.crash == engine.last_crash


def not_restarted(reason: Reason | None) -> Reason | None:
    """Return `reason` with a message that also says why the run is not restarted."""
    if reason is None:
        return None
    message = f"{reason.message} The run is not restarted, because it exited at the same point before."
    return Reason(code=reason.code, message=message, hint=reason.hint)


def next_try(engine: EngineRecord) -> int | None:
    """Return an engine's new restart count after a failure that its server caused, or None if the engine is not restarted.

    The restart policy is ignored, because the engine did not cause the failure.
    """
    return engine.restarts + 1 if engine.desired is DesiredState.RUNNING and engine.restarts < engine.max_restarts else None
