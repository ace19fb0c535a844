"""Decide which checkpoint or result of a training run should be served."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from sage.llm.client.types import DesiredState, EngineState
from sage.llm.control_plane.actions import Publish
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord


class ServedRun(BaseModel):
    """How a training run is served: the request of the user, and the versions that were published."""

    model_config = ConfigDict(frozen=True)

    name: str
    checkpoints: bool = False  #: whether the newest checkpoint is served while the run trains
    after_step: int | None = None  #: a user has requested to serve the next checkpoint after this step; None: no request
    engine_id: str | None = None  #: id of the engine that serves the run; None: no engine yet
    step: int = 0  #: step of the last checkpoint whose publication has ended, with or without success
    is_complete: bool = False  #: whether the publication of the result has ended, with or without success

    @classmethod
    def of(cls, engine: EngineRecord) -> Self | None:
        """Return how the run of an engine is served, or None if the run is not served."""
        return None if engine.serve is None else cls.model_validate(engine.serve)

    def published(self, step: int | None, engine_id: str | None) -> Self:
        """Return a copy that records a publication.  step: step of the checkpoint, or None for the run's result."""
        version: dict[str, Any] = {"is_complete": True} if step is None else {"step": step, "after_step": None}
        return self.model_copy(update={"engine_id": engine_id, **version})


def due(engine: EngineRecord, observed: Observed) -> Publish | None:
    """Return the action that publishes the newest version of a run, or None if there is nothing to publish."""
    serve, training = ServedRun.of(engine), observed.training
    if serve is None or training is None:
        return None
    if observed.ended in (EngineState.COMPLETED, EngineState.STOPPED):
        return None if serve.is_complete else Publish(engine, None)
    step = training.checkpoint_step or 0
    is_requested = serve.checkpoints or (serve.after_step is not None and step > serve.after_step)
    is_ending = engine.desired is DesiredState.STOPPED or training.step == training.total_steps
    is_due = is_requested and step > serve.step and observed.ended is None and not is_ending
    return Publish(engine, step) if is_due else None
