"""Types of requests to change the options of a training run, and to fork a training run."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sage.common.training import TrainingOptions
from sage.llm.client.types import check_engine_name


class TrainingChange(TrainingOptions):
    """A request to change options of a training run. The new values are used from the next step on."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingChangeView(BaseModel):
    """An accepted change of options.

    If the engine's `training.change_revision` is at least `revision`, the run uses the new values.
    """

    object: str = "training_change"
    engine_id: str
    revision: int = Field(description="Sequence number of the request in this run, from 1.")


class ForkRequest(BaseModel):
    """A request to start a run that continues from a checkpoint of another run (the original run)."""

    model_config = ConfigDict(extra="forbid")

    step: int | None = Field(None, ge=1, description="Step of the checkpoint; default: the newest checkpoint.")
    name: str | None = Field(
        None, max_length=200, description="Name of the new engine; default: name of the original run's engine."
    )
    output_dir: str = Field(min_length=1, description="Absolute path of a new or empty folder for the result.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="New values of options, such as `learning_rate`; default: the values in the original run.",
    )

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_engine_name(name)
