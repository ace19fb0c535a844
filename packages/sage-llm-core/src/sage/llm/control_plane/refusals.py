"""The errors with which the control plane refuses requests."""

from sage.common.errors import Conflict, Overloaded
from sage.llm.client.types import SETTLED, DesiredState, EngineState, Reason
from sage.llm.control_plane.store.records import EngineRecord, LeaderInfo


def busy(engine_id: str) -> Conflict:
    """Return the error for a write that conflicted with other writes at every attempt."""
    return Conflict(code="busy", message=f"{engine_id} is being changed by other requests.", hint="Retry.")


def still_running(engine_id: str, problem: str, hint: str) -> Conflict:
    """Return the error for an engine that cannot be removed yet. `{}` in the hint stands for the engine's id."""
    return Conflict(code="still_running", message=f"{engine_id} {problem}.", hint=hint.format(engine_id))


def not_resumable(engine_id: str, state: EngineState) -> Conflict:
    """Return the error for an engine that cannot be resumed."""
    return Conflict(
        code="not_resumable",
        message=f"{engine_id} is {state}: only stopped, failed and paused engines can be resumed.",
        hint=f"`sage llm engine status {engine_id}` shows the engine's state.",
    )


def not_pausable(engine: EngineRecord) -> Conflict:
    """Return the error for an engine that cannot be paused."""
    what = "being stopped" if engine.desired is DesiredState.STOPPED and engine.state not in SETTLED else engine.state
    return Conflict(
        code="not_pausable",
        message=f"{engine.id} is {what}: only an engine that is queued, starting or running can be paused.",
        hint=f"`sage llm engine status {engine.id}` shows the engine's state.",
    )


def not_queued(engine: EngineRecord) -> Conflict:
    """Return the error for an engine that cannot be moved in the queue."""
    return Conflict(
        code="not_queued",
        message=f"{engine.id} is {engine.state}: only a waiting engine can be moved in the queue.",
        hint="`sage llm queue` shows the waiting engines.",
    )


def not_training(engine: EngineRecord) -> Conflict:
    """Return the error for an engine that cannot save a checkpoint."""
    return Conflict(
        code="not_training",
        message=f"{engine.id} (kind {engine.kind}, state {engine.state}) cannot save a checkpoint. Only a running "
        "training run can save one.",
        hint=f"`sage llm engine status {engine.id}` shows the engine's state.",
    )


def no_run(engine: EngineRecord) -> Conflict:
    """Return the error for a request that only training runs accept, if the engine is of another kind."""
    return Conflict(
        code="not_training",
        message=f"{engine.id} is an engine of kind {engine.kind}, not a training run.",
        hint="`sage llm engine list --kind finetune` shows the training runs.",
    )


def still_validating(engine_id: str) -> Conflict:
    """Return the error for a change of a run that is being validated."""
    return Conflict(
        code="not_training",
        message=f"{engine_id} is still being validated.",
        hint="Retry when the run is queued or running.",
    )


def other_node(engine: EngineRecord) -> Conflict:
    """Return the error for a request about an engine of another node."""
    return Conflict(
        code="other_node",
        message=f"{engine.id} belongs to node {engine.node}, and this gateway manages another node.",
        hint=f"Send the request to the gateway of node {engine.node}.",
    )


def standby(leader: LeaderInfo | None) -> Overloaded:
    """Return the error for a write by a control plane that does not hold the lease (the right to change engines)."""
    where = f"; the active gateway is {leader.url}" if leader and leader.url else ""
    hint = f"Send the request to {leader.url}." if leader and leader.url else "Retry in some seconds."
    return Overloaded(code="standby", message=f"This gateway is on standby{where}.", hint=hint)


def paused(engine_id: str, paused_by: str) -> Overloaded:
    """Return the error for a request to an engine that is paused.

    paused_by: `user`, or the id of the engine that needs the memory.
    """
    if paused_by == "user":
        message, hint = f"{engine_id} was paused by a user.", f"`sage llm engine resume {engine_id}` loads the engine again."
    else:
        message, hint = (
            f"{engine_id} makes room for {paused_by}.",
            "Retry later. The paused engine is loaded again when memory is free.",
        )
    return Overloaded(code="engine_paused", message=message, hint=hint)


def ended(engine_id: str, model: str, state: EngineState, reason: Reason | None) -> Overloaded:
    """Return the error for a request that waited for an engine which ended before it was ready."""
    why = f": {reason.message}" if reason else "."
    return Overloaded(
        code="engine_ended",
        message=f"The engine {engine_id} for '{model}' is {state}{why}",
        hint=f"`sage llm engine resume {engine_id}` starts the engine again.",
    )
