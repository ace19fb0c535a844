"""Types for training runs: the figures (measured values) of a step, the events of a run, and the progress of a run.

To add a figure, add a field to `StepMetrics`, and measure the value in the training callback. No other code needs a change,
because all readers iterate over `FIGURES`. For example:

    for figure in FIGURES:
        value = getattr(progress, figure.name)  # progress: TrainingProgress, TrainingStep or StepEvent
        if value is not None:
            print(figure.title, figure.text(value))

The events are the lines of a run directory's `events.jsonl`; see docs/internals/run-directory.md.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


def _figure(title: str, unit: str, format_spec: str, description: str) -> Any:
    return Field(None, title=title, description=description, json_schema_extra={"unit": unit, "format_spec": format_spec})


class StepMetrics(BaseModel):
    """The figures of one optimizer step. None: the value is not known, or the training method does not have this figure."""

    model_config = ConfigDict(frozen=True)

    epoch: float | None = _figure("Epoch", "", ".2f", "Completed passes over the dataset.")
    loss: float | None = _figure("Loss", "nats per token", ".4f", "Training loss of the step.")
    token_accuracy: float | None = _figure(
        "Token accuracy", "ratio", ".1%", "Share of trained tokens that the model predicts correctly."
    )
    reward: float | None = _figure(
        "Reward", "", ".3f", "Only for grpo: mean reward of the completions generated in this step."
    )
    reward_accuracy: float | None = _figure(
        "Reward accuracy",
        "ratio",
        ".1%",
        "Only for dpo and orpo: share of the preference pairs in which the chosen answer has the higher reward.",
    )
    learning_rate: float | None = _figure("Learning rate", "", ".3g", "Learning rate of the step.")
    grad_norm: float | None = _figure("Gradient norm", "", ".3g", "Norm of the gradient before clipping.")
    tokens_per_second: float | None = _figure(
        "Tokens per second", "tokens per second", ".0f", "Training throughput over the last 20 steps."
    )
    memory_bytes: int | None = _figure(
        "Memory", "bytes", ".0f", "Memory that the run's process uses now: GPU memory, or main memory if there is no GPU."
    )
    peak_memory_bytes: int | None = _figure(
        "Peak memory", "bytes", ".0f", "Peak memory of the run's process since the process was started."
    )


@dataclass(frozen=True)
class Figure:
    """Title, unit and number format of a field of `StepMetrics`."""

    name: str  #: name of the field
    title: str
    unit: str  #: `ratio` for a number from 0 to 1; empty for a plain number
    description: str
    format_spec: str

    def text(self, value: float) -> str:
        """Return a value as text for users. Bytes are shown in GB."""
        return f"{value / 1e9:.1f} GB" if self.unit == "bytes" else format(value, self.format_spec)


def _declared(name: str) -> Figure:
    field = StepMetrics.model_fields[name]
    extra = cast(dict[str, str], field.json_schema_extra)
    return Figure(name, field.title or name, extra["unit"], field.description or "", extra["format_spec"])


#: All figures of a step, in the order in which they are shown.
FIGURES: tuple[Figure, ...] = tuple(_declared(name) for name in StepMetrics.model_fields)


class TrainingStep(StepMetrics):
    """One optimizer step of a run, with its figures."""

    step: int


class TrainingProgress(StepMetrics):
    """Progress of a run, with the figures of its last step. None: the value is not known (yet)."""

    step: int = Field(description="Completed optimizer steps.")
    total_steps: int | None = Field(None, description="Total number of optimizer steps of the run.")
    progress: float | None = Field(None, description="Completed steps divided by total steps, from 0 to 1.")
    eta_seconds: float | None = Field(None, description="Seconds until the run is completed; null if not yet estimated.")
    checkpoint_step: int | None = Field(None, description="Step of the newest checkpoint.")
    heldout_loss_before: float | None = Field(
        None, description="Loss on the held-out samples before the first step, in nats per token."
    )
    heldout_loss: float | None = Field(
        None, description="Loss at the last evaluation on the held-out samples, in nats per token."
    )
    estimated_memory_bytes: int | None = Field(
        None, description="Peak memory of the run, as estimated before the first step."
    )
    activity: str | None = Field(None, description="What the run does before its first step or after its last step.")
    warnings: list[str] = []
    change_revision: int = Field(
        0, description="Sequence number of the newest change of options that the run has applied; 0: none."
    )
    changes: list[str] = Field([], description="The changes of options that users requested, as text for users.")
    forked_from: str | None = Field(None, description="Id of the run that this run was forked from.")
    forked_at_step: int | None = Field(None, description="Step of the checkpoint that this run was forked from.")

    @property
    def memory_estimate_error_ratio(self) -> float | None:
        """The estimated peak memory divided by the measured peak, minus 1; None if one of the two peaks is not known."""
        if not self.estimated_memory_bytes or not self.peak_memory_bytes:
            return None
        return self.estimated_memory_bytes / self.peak_memory_bytes - 1


class TrainingOptions(BaseModel):
    """The options that can be changed while a run trains. None: the option is not changed."""

    model_config = ConfigDict(frozen=True)

    learning_rate: float | None = Field(None, gt=0, le=1, description="Peak learning rate.")
    max_steps: int | None = Field(None, ge=1, description="Total number of optimizer steps.")
    early_stopping_patience: int | None = Field(
        None, ge=0, description="Number of evaluations without improvement after which the run ends; 0: no early stopping."
    )


class RunEvent(BaseModel):
    """A line of `events.jsonl`. Readers ignore unknown fields."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    event: str = Field(description="Type of the event.")
    time: datetime | None = Field(None, description="Time at which the event was appended, UTC.")


class LaunchedEvent(RunEvent):
    """A worker process was started."""

    event: Literal["launched"] = "launched"


class ProgressEvent(RunEvent):
    """The run reported its current activity, before the first step or after the last step."""

    event: Literal["progress"] = "progress"
    message: str = Field(description="What the run does now, as text for users.")


class WarningEvent(RunEvent):
    """The run reported a warning to the user, and continues."""

    event: Literal["warning"] = "warning"
    message: str = Field(description="The warning, as text for users.")
    halvings: int | None = Field(
        None, description="How many times each micro-batch is now cut in half; the result is up to 2^halvings parts."
    )
    activation_checkpointing: bool | None = Field(
        None,
        description="Whether gradient checkpointing is now on; version 0.1.0 named this field `checkpointing`.",
        validation_alias=AliasChoices("activation_checkpointing", "checkpointing"),
    )


class StartedEvent(RunEvent):
    """Training began at step 0 or continued from a checkpoint."""

    event: Literal["started"] = "started"
    step: int = Field(
        description="Step of the checkpoint from which training continues; 0: training begins at the first step."
    )
    total_steps: int = Field(description="Total number of optimizer steps of the run.")
    samples: int | None = Field(None, description="Number of training samples; null if the dataset is streamed.")
    heldout_samples: int | None = Field(None, description="Number of held-out samples.")
    trainable_parameters: int | None = Field(None, description="Number of trained parameters.")
    base_sha256: str | None = Field(
        None, description="Fingerprint of the base model. The run cannot be resumed if this fingerprint has changed."
    )
    bf16: bool | None = Field(None, description="Whether base model and activations are in bf16 instead of fp32.")
    bf16_products: bool | None = Field(
        None, description="Whether matrix products use bf16; null: they use bf16 if the field `bf16` is true."
    )
    int8_products: bool = Field(
        False, description="Whether weights are stored in int8 and matrix products use int8; only with SAGE's kernels."
    )
    base_bits: int | None = Field(
        None, description="Bits per weight of the base model if bitsandbytes quantizes it, else null."
    )
    precision: str | None = Field(
        None, description="The numeric precision of the training, and why it is used, as text for users."
    )
    kernels: str | None = Field(
        None, description="Whether SAGE's kernels are used for training, and why, as text for users."
    )
    estimated_memory_bytes: int | None = Field(None, description="Estimated peak memory of the run.")
    versions: dict[str, str] = Field({}, description="Versions of the libraries that the training uses.")


class StepEvent(StepMetrics, RunEvent):
    """An optimizer step was completed. A resumed run reports the steps after its checkpoint a second time."""

    event: Literal["step"] = "step"
    step: int = Field(description="The completed step; the first step is 1.")
    total_steps: int | None = Field(None, description="Total number of optimizer steps of the run.")
    eta_seconds: float | None = Field(
        None, description="Seconds until the run is completed; null for the first 9 steps after a start."
    )


class CheckpointEvent(RunEvent):
    """A checkpoint was completed and synced to disk."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int = Field(description="Step after which the checkpoint was saved.")
    path: str | None = Field(None, description="Folder of the checkpoint.")


class EvalEvent(RunEvent):
    """The loss of the held-out samples was measured."""

    event: Literal["eval"] = "eval"
    step: int = Field(description="Step after which the loss was measured; 0: before training.")
    loss: float = Field(description="Mean loss over the completion tokens of the held-out samples, in nats per token.")
    samples: int | None = Field(None, description="Number of held-out samples.")
    seconds: float = Field(0.0, description="Duration of the evaluation.")


class SampleEvent(RunEvent):
    """The model generated an answer to one of `sample_prompts`."""

    event: Literal["sample"] = "sample"
    step: int = Field(description="Step after which the answer was generated.")
    prompt: str = Field(description="The prompt.")
    answer: str = Field(description="The model's answer, generated with greedy decoding, at most 64 tokens.")


class ChangedEvent(RunEvent):
    """A user changed options of the run."""

    event: Literal["changed"] = "changed"
    step: int = Field(description="First step that uses the changed options.")
    revision: int = Field(description="Number of the change request; the first request of a run has number 1.")
    old: TrainingOptions = Field(description="Values before the change.")
    new: TrainingOptions = Field(description="Values after the change.")
    message: str = Field(description="Description of the change, as text for users.")


class ForkedEvent(RunEvent):
    """The run was created from a checkpoint of another run. The events before this event are from the other run."""

    event: Literal["forked"] = "forked"
    step: int = Field(description="Step of the checkpoint.")
    parent: str = Field(description="Id of the other run.")


class StoppedEvent(RunEvent):
    """The run stopped on request, after it saved a checkpoint and the current model."""

    event: Literal["stopped"] = "stopped"
    step: int = Field(description="Last completed step.")
    output_dir: str | None = Field(None, description="Output folder, which contains the model as trained up to this step.")


class FinishedEvent(RunEvent):
    """The run was completed, and its result was written."""

    event: Literal["finished"] = "finished"
    step: int | None = Field(
        None, description="Step whose weights are in `output_dir`; with keep_best, not always the last step."
    )
    output_dir: str | None = Field(None, description="Output folder, which contains the trained model.")
    heldout_loss: float | None = Field(
        None, description="Loss of the model in `output_dir` on the held-out samples, in nats per token."
    )


class FailedEvent(RunEvent):
    """The run failed and reported an error."""

    event: Literal["failed"] = "failed"
    code: str = Field(description="Error code, which stays the same in later versions.")
    message: str = Field(description="The error message, as text for users.")
    hint: str | None = Field(None, description="What to do next.")


AnyRunEvent: TypeAlias = (
    LaunchedEvent
    | ProgressEvent
    | WarningEvent
    | StartedEvent
    | StepEvent
    | CheckpointEvent
    | EvalEvent
    | SampleEvent
    | ChangedEvent
    | ForkedEvent
    | StoppedEvent
    | FinishedEvent
    | FailedEvent
)

_ADAPTER: TypeAdapter[AnyRunEvent] = TypeAdapter(Annotated[AnyRunEvent, Field(discriminator="event")])


def parse_event(line: bytes) -> AnyRunEvent | None:
    """Return the event in a line, or None if the line is damaged, a field is missing, or the type is unknown."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError:
        return None
