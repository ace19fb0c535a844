"""Plan when an idle engine is unloaded, and when it is loaded again.

To pause an engine, the control plane sets the desired state to `paused` and clears `last_request_at`. The next request
sets `last_request_at`. Then the plan sets the desired state to `running`, even if the engine is not unloaded yet.
"""

from sage.llm.client.types import DesiredState, EngineState, Reason
from sage.llm.control_plane.actions import SetDesired
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.watch import Watch


def idle_change(engine: EngineRecord, watch: Watch) -> SetDesired | None:
    """Return the action that pauses an idle engine, or that resumes a paused engine after a request; otherwise None."""
    if engine.desired is DesiredState.PAUSED:
        return SetDesired(engine, DesiredState.RUNNING) if engine.last_request_at else None
    if engine.state is not EngineState.RUNNING or engine.desired is not DesiredState.RUNNING:
        return None
    is_idle = engine.idle_stop_minutes is not None and watch.idle_seconds >= 60 * engine.idle_stop_minutes
    return SetDesired(engine, DesiredState.PAUSED) if is_idle else None


def is_stopping(engine: EngineRecord) -> bool:
    """Return whether an engine must be stopped or unloaded, or is already stopping."""
    return engine.desired is not DesiredState.RUNNING or engine.state is EngineState.STOPPING


def is_pausing(engine: EngineRecord) -> bool:
    """Return whether an engine that is stopping will be `paused` afterwards, so that the next request loads it again."""
    return engine.idle_stop_minutes is not None and engine.desired is not DesiredState.STOPPED


def state_without_process(engine: EngineRecord) -> EngineState:
    """Return the next state of a stopping engine: `paused` if it is only unloaded, otherwise `stopped`."""
    return EngineState.PAUSED if is_pausing(engine) else EngineState.STOPPED


def reason_of_stop(engine: EngineRecord) -> Reason | None:
    """Return why an engine is unloaded; None if a user requested its stop."""
    if not is_pausing(engine):
        return None
    minutes = f"{engine.idle_stop_minutes:g} min"
    message = f"The engine had no requests for {minutes}, so it is unloaded. The next request loads it again."
    return Reason(code="idle", message=message)
