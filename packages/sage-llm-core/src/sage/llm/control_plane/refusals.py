"""Why the control plane refuses what a user asked for."""

from sage.common.errors import Conflict, Overloaded
from sage.llm.client.types import EngineState, Reason
from sage.llm.control_plane.store.records import EngineRecord, LeaderInfo


def busy(engine_id: str) -> Conflict:
    """Return the refusal of a write that met other writes again and again."""
    return Conflict(code="busy", message=f"{engine_id} is being changed by other requests.", hint="Retry.")


def still_running(engine_id: str, problem: str, hint: str) -> Conflict:
    """Return the refusal to remove an engine; `{}` in the hint stands for its id."""
    return Conflict(code="still_running", message=f"{engine_id} {problem}.", hint=hint.format(engine_id))


def not_resumable(engine_id: str, state: EngineState) -> Conflict:
    """Return the refusal to resume an engine."""
    return Conflict(
        code="not_resumable",
        message=f"{engine_id} is {state}: only stopped and failed engines can be resumed.",
        hint=f"`sage llm engine status {engine_id}` shows its state.",
    )


def other_node(engine: EngineRecord) -> Conflict:
    """Return the refusal of a request about an engine that another node owns."""
    return Conflict(
        code="other_node",
        message=f"{engine.id} belongs to {engine.node}, another node of this database.",
        hint="Send the request to the gateway of that node.",
    )


def standby(leader: LeaderInfo | None) -> Overloaded:
    """Return the refusal of a write by a control plane that does not have the lease."""
    where = f"; {leader.url} is active" if leader and leader.url else ""
    hint = f"Send the request to {leader.url}." if leader and leader.url else "Retry in some seconds."
    return Overloaded(code="standby", message=f"This gateway is standby{where}.", hint=hint)


def ended(engine_id: str, model: str, state: EngineState, reason: Reason | None) -> Overloaded:
    """Return the refusal of a request whose engine was settled before it was ready."""
    why = f": {reason.message}" if reason else ""
    return Overloaded(
        code="engine_ended",
        message=f"{engine_id} for '{model}' is {state}{why}",
        hint=f"`sage llm engine resume {engine_id}` starts it again.",
    )
