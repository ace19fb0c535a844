"""From the model that a request names to the engine that answers it; pure."""

from collections.abc import Callable, Sequence

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import DEFAULT_MODEL, EngineKind, EngineState
from sage.llm.control_plane.store.store import EngineRecord

_SHOWN_CHARACTERS = 100


def select_engine(
    engines: Sequence[EngineRecord], model: str, kind: EngineKind, is_responsive: Callable[[str], bool]
) -> EngineRecord:
    """Return the engine that a request for `model` means, by id, name or model; engines: active ones, oldest first.

    One that runs and responds comes first, the newest of several; else the newest that is being started is waited for.
    Raises Overloaded if the only one that runs does not respond, NotFound, which names those that there are, for none.
    """
    active = [engine for engine in engines if engine.kind is kind and engine.state is not EngineState.STOPPING]
    is_default = model == DEFAULT_MODEL
    meant = active if is_default else [engine for engine in active if model in (engine.id, engine.name, engine.model)]
    running = [engine for engine in meant if engine.state is EngineState.RUNNING]
    responsive = [engine for engine in running if is_responsive(engine.id)]
    starting = [engine for engine in meant if engine.state is not EngineState.RUNNING]
    if responsive:
        return max(responsive, key=lambda engine: engine.last_event) if is_default else responsive[-1]
    if starting:
        return starting[-1]
    if running:
        raise unresponsive(running[-1].id)
    wanted = "MODEL" if is_default else _shortened(model)
    names = ", ".join(dict.fromkeys(engine.name for engine in reversed(active))) or "none"
    raise NotFound(
        code="model_not_found",
        message=f"No engine of kind {kind} serves the model '{_shortened(model)}'; there are: {names}.",
        hint=f"Start one: `sage llm engine start {wanted} --engine-kind {kind}`.",
        param="model",
    )


def unresponsive(engine_id: str) -> Overloaded:
    """Return the refusal of a request to an engine that lives and does not answer."""
    return Overloaded(
        code="engine_unresponsive",
        message=f"{engine_id} runs, but does not respond.",
        hint=f"Try again later, or restart it: `sage llm engine stop --force {engine_id}`, then `resume`.",
    )


def _shortened(model: str) -> str:
    return model if len(model) <= _SHOWN_CHARACTERS else f"{model[:_SHOWN_CHARACTERS]}…"
