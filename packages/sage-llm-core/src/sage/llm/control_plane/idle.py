"""Plan when an idle engine is unloaded, and when it is loaded again.

A pause clears `last_request_at`, and the next request sets `last_request_at` again. If the engine was paused because it was
idle, the plan then sets the desired state to `running`, even if the engine is not unloaded yet.
"""

from sage.llm.client.types import DesiredState, EngineState, Reason
from sage.llm.control_plane.actions import SetDesired
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.watch import Watch


def idle_change(engine: EngineRecord, watch: Watch) -> SetDesired | None:
    """Return the action that pauses an idle engine, or that resumes a paused engine after a request. None: no action."""
    if engine.desired is DesiredState.PAUSED:
        is_wanted = engine.last_request_at is not None and engine.paused_by in (None, "idle")
        return SetDesired(engine, DesiredState.RUNNING) if is_wanted else None
    if engine.state is not EngineState.RUNNING or engine.desired is not DesiredState.RUNNING:
        return None
    is_idle = engine.idle_stop_minutes is not None and watch.idle_seconds >= 60 * engine.idle_stop_minutes
    return SetDesired(engine, DesiredState.PAUSED, paused_by="idle") if is_idle else None


def is_stopping(engine: EngineRecord) -> bool:
    """Return whether an engine must be stopped or unloaded, or is already stopping."""
    return engine.desired is not DesiredState.RUNNING or engine.state is EngineState.STOPPING


def is_pausing(engine: EngineRecord) -> bool:
    """Return whether a stopping engine gets the state `paused` afterwards."""
    if engine.desired is DesiredState.PAUSED:
        return True
    return engine.idle_stop_minutes is not None and engine.desired is DesiredState.RUNNING


def is_making_room(engine: EngineRecord) -> bool:
    """Return whether an engine is paused, or about to be paused, so that another engine can run."""
    return engine.desired is DesiredState.PAUSED and engine.paused_by not in (None, "idle", "user")


def is_paused_by_user(engine: EngineRecord) -> bool:
    """Return whether an engine is paused, or about to be paused, until a user resumes it."""
    return engine.desired is DesiredState.PAUSED and engine.paused_by == "user"


def state_without_process(engine: EngineRecord) -> EngineState:
    """Return the next state of a stopping engine: `paused` or `stopped`."""
    return EngineState.PAUSED if is_pausing(engine) else EngineState.STOPPED


def reason_of_stop(engine: EngineRecord) -> Reason | None:
    """Return why an engine is unloaded, or None if a user stops the engine."""
    if not is_pausing(engine):
        return None
    if engine.paused_by == "user" or (engine.paused_by is None and engine.idle_stop_minutes is None):
        hint = f"`sage llm engine resume {engine.id}` resumes the engine."
        return Reason(code="paused", message="The engine was paused, as requested, and uses no memory.", hint=hint)
    if engine.paused_by not in (None, "idle"):
        message = f"The engine makes room for {engine.paused_by}, and is loaded again when enough memory is free."
        return Reason(code="makes_room", message=message)
    minutes = f"{engine.idle_stop_minutes:g} min"
    message = f"The engine is unloaded after {minutes} without requests. The next request loads the engine again."
    return Reason(code="idle", message=message)
