"""The status of a run, computed only from the events and the lock of the run."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sage.common.training import (
    AnyRunEvent,
    ChangedEvent,
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    ForkedEvent,
    LaunchedEvent,
    ProgressEvent,
    StartedEvent,
    StepEvent,
    StepMetrics,
    StoppedEvent,
    TrainingProgress,
    WarningEvent,
)


class RunState(StrEnum):
    """State of a run."""

    CREATED = "created"  #: the run directory exists; no process was started yet
    STARTING = "starting"  #: the worker loads the data and the model
    RUNNING = "running"  #: the worker trains
    STOPPED = "stopped"  #: the run stopped on request, after saving a checkpoint
    COMPLETED = "completed"  #: the result is in the output folder
    FAILED = "failed"  #: the run ended with an error; `message` describes the error


#: States in which a run has a process, unless the process has crashed.
ALIVE = (RunState.STARTING, RunState.RUNNING)


@dataclass(frozen=True)
class RunStatus:
    """Status of a run. A field is None if the run does not have the value, or if the value is not known yet."""

    state: RunState = RunState.CREATED
    step: int = 0
    total_steps: int | None = None
    metrics: StepMetrics = field(default_factory=StepMetrics)  #: figures of the last step
    eta_seconds: float | None = None  #: None if there is no estimate yet
    checkpoint_step: int | None = None  #: step of the newest checkpoint
    heldout_loss_before: float | None = None
    heldout_loss: float | None = None
    code: str | None = None
    message: str | None = None  #: reason for the failure, or current activity
    hint: str | None = None
    warnings: tuple[str, ...] = ()
    base_sha256: str | None = None  #: fingerprint of the base model
    bf16: bool | None = None  #: True: the base model is in bf16; False: in fp32
    bf16_products: bool | None = None  #: whether matrix products are computed in bf16
    int8_products: bool | None = None  #: whether SAGE's training step quantizes layers to int8 and uses int8 products
    base_bits: int | None = None  #: bits per weight if bitsandbytes quantizes the base model, else None
    estimated_memory_bytes: int | None = None  #: peak memory that was estimated before the first step
    halvings: int = 0  #: how many times each micro-batch is cut in half to save memory
    activation_checkpointing: bool = False  #: whether activations are recomputed to save memory
    is_loaded: bool = False  #: whether the last process has loaded the data and the model
    change_revision: int = 0  #: sequence number of the newest change of the run's options; 0: no change
    changes: tuple[str, ...] = ()  #: changes of options, as text for users
    forked_from: str | None = None  #: id of the run whose checkpoint this run continues from
    forked_at_step: int | None = None

    @property
    def progress(self) -> float | None:
        """Share of the steps that are completed, from 0 to 1; None if the number of steps is unknown."""
        return self.step / self.total_steps if self.total_steps else None

    def training_progress(self) -> TrainingProgress:
        """Return the progress that is shown to users."""
        return TrainingProgress(
            **dict(self.metrics),
            step=self.step,
            total_steps=self.total_steps,
            progress=self.progress,
            eta_seconds=self.eta_seconds,
            checkpoint_step=self.checkpoint_step,
            heldout_loss_before=self.heldout_loss_before,
            heldout_loss=self.heldout_loss,
            estimated_memory_bytes=self.estimated_memory_bytes,
            activity=self.message if self.state in ALIVE else None,
            warnings=list(self.warnings),
            change_revision=self.change_revision,
            changes=list(self.changes),
            forked_from=self.forked_from,
            forked_at_step=self.forked_at_step,
        )


def fold(status: RunStatus, events: Iterable[AnyRunEvent]) -> RunStatus:
    """Return a copy of the status, updated with the events."""
    step: StepEvent | None = None  # the latest step event that is not applied yet
    for event in events:
        if isinstance(event, StepEvent):
            step = event
            continue
        status, step = _with_step(status, step), None
        status = replace(status, **_changes(status, event))
    return _with_step(status, step)


def derive(status: RunStatus, *, alive: bool) -> RunStatus:
    """Return the actual status: if the state is in `ALIVE` but no process is alive, the state is changed to `failed`."""
    if alive or status.state not in ALIVE:
        return status
    start = f"checkpoint {status.checkpoint_step}" if status.checkpoint_step else "the beginning of the run"
    return replace(
        status,
        state=RunState.FAILED,
        eta_seconds=None,
        code="worker_died",
        message=f"The training process exited at step {status.step} without reporting an error (killed, or out of memory).",
        hint=f"`resume` continues from {start}.",
    )


def _changes(status: RunStatus, event: AnyRunEvent) -> dict[str, Any]:
    match event:
        case LaunchedEvent():
            return {
                "state": RunState.STARTING,
                "is_loaded": False,
                "code": None,
                "message": None,
                "hint": None,
                "eta_seconds": None,
            }
        case StartedEvent():
            return _started(status, event)
        case CheckpointEvent():
            return {"checkpoint_step": event.step}
        case EvalEvent():
            return {"heldout_loss" if event.step else "heldout_loss_before": event.loss}
        case WarningEvent():
            adapted = {"halvings": event.halvings, "activation_checkpointing": event.activation_checkpointing}
            # Remove duplicates, because a resumed run repeats its warnings.
            warnings = tuple(dict.fromkeys((*status.warnings, event.message)))
            return {"warnings": warnings, **{name: value for name, value in adapted.items() if value is not None}}
        case ProgressEvent():
            return {"message": event.message}
        case ChangedEvent():
            changes = (*status.changes, event.message)
            return {
                "change_revision": event.revision,
                "changes": changes,
                "total_steps": event.new.max_steps or status.total_steps,
            }
        case ForkedEvent():
            return _forked(event)
        case StoppedEvent():
            return {"state": RunState.STOPPED, "step": event.step, "eta_seconds": None}
        case FinishedEvent():
            loss = status.heldout_loss if event.heldout_loss is None else event.heldout_loss
            return {"state": RunState.COMPLETED, "eta_seconds": 0.0, "message": None, "heldout_loss": loss}
        case FailedEvent():
            reason = {"code": event.code, "message": event.message, "hint": event.hint}
            return {"state": RunState.FAILED, "eta_seconds": None, **reason}
        case _:
            return {}


def _with_step(status: RunStatus, event: StepEvent | None) -> RunStatus:
    if event is None:
        return status
    return replace(
        status,
        step=event.step,
        total_steps=event.total_steps,
        eta_seconds=event.eta_seconds,
        metrics=StepMetrics.model_validate(vars(event)),
        message=None,
    )


def _started(status: RunStatus, event: StartedEvent) -> dict[str, Any]:
    return {
        "state": RunState.RUNNING,
        "is_loaded": True,
        "message": None,
        "step": event.step,
        "total_steps": event.total_steps,
        "base_sha256": event.base_sha256 or status.base_sha256,
        # The run has begun at its newest intact checkpoint. If there are checkpoints after `event.step`, they are damaged.
        "checkpoint_step": min(status.checkpoint_step or 0, event.step) or None,
        "bf16": event.bf16,
        "bf16_products": event.bf16 if event.bf16_products is None else event.bf16_products,
        "int8_products": event.int8_products,
        "base_bits": event.base_bits,
        "estimated_memory_bytes": event.estimated_memory_bytes,
    }


def _forked(event: ForkedEvent) -> dict[str, Any]:
    return {
        "state": RunState.CREATED,
        "message": None,
        "eta_seconds": None,
        "step": event.step,
        "checkpoint_step": event.step,
        "forked_from": event.parent,
        "forked_at_step": event.step,
    }
