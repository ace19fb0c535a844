"""Where a run is, derived from its events and its lock and from nothing else."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sage.libs.finetune.run.rundir import Event


class RunState(StrEnum):
    """Where a run is in its life."""

    CREATED = "created"  #: its directory exists, nothing was started
    STARTING = "starting"  #: its worker loads data and model
    RUNNING = "running"  #: it trains
    STOPPED = "stopped"  #: it was asked to stop and saved what it had
    COMPLETED = "completed"  #: the result is in the output folder
    FAILED = "failed"  #: it ended otherwise; `message` says how


#: A run in one of these has a process, or has died.
ALIVE = (RunState.STARTING, RunState.RUNNING)


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run. None: not known yet."""

    state: RunState = RunState.CREATED
    step: int = 0
    total_steps: int | None = None
    bf16: bool | None = None  #: whether the base is in bf16, else in fp32
    bf16_products: bool | None = None  #: whether matrix products are, too
    int8_products: bool | None = None  #: whether layers are held in 8 bits by our own step, and multiplied so
    epoch: float | None = None
    loss: float | None = None  #: of the last step, nats per token
    token_accuracy: float | None = None
    reward: float | None = None  #: mean over the step's answers, by the reward function (grpo)
    reward_accuracy: float | None = None  #: share of pairs of which the better answer is the likelier (dpo, orpo)
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None  #: None while it is being estimated
    memory_bytes: int | None = None
    checkpoint_step: int | None = None  #: the newest checkpoint
    heldout_loss_before: float | None = None
    heldout_loss: float | None = None
    code: str | None = None
    message: str | None = None  #: why it failed, or what it is doing
    hint: str | None = None
    warnings: tuple[str, ...] = ()
    base_sha256: str | None = None  #: fingerprint of the base model
    halvings: int = 0  #: micro-batches are cut in two this many times, for want of memory
    checkpointing: bool = False  #: activations are computed again, for want of memory

    @property
    def progress(self) -> float | None:
        """Share of the steps that is done, 0 to 1."""
        return self.step / self.total_steps if self.total_steps else None


_STEP_FIELDS = (
    "step", "total_steps", "epoch", "loss", "token_accuracy", "reward", "reward_accuracy", "learning_rate", "grad_norm",
    "tokens_per_second", "eta_seconds", "memory_bytes",
)  # fmt: skip


def fold(status: RunStatus, events: Iterable[Event]) -> RunStatus:
    """Return the status after more events; one that lacks what it should say changes nothing."""
    for event in events:
        with contextlib.suppress(KeyError, TypeError):
            status = _apply(status, event)
    return status


def derive(status: RunStatus, *, alive: bool) -> RunStatus:
    """Return the status as it really is: a run that should be going but has no process has failed."""
    if alive or status.state not in ALIVE:
        return status
    saved = f"checkpoint {status.checkpoint_step}" if status.checkpoint_step else "its beginning"
    return replace(
        status,
        state=RunState.FAILED,
        eta_seconds=None,
        code="worker_died",
        message=f"The training process exited at step {status.step} without reporting an error (killed, or out of memory).",
        hint=f"`resume` goes on from {saved}.",
    )


def _apply(status: RunStatus, event: Event) -> RunStatus:
    match event["event"]:
        case "launched":
            return replace(status, state=RunState.STARTING, code=None, message=None, hint=None, eta_seconds=None)
        case "started":
            bf16 = event.get("bf16")
            numbers = {"bf16": bf16, "bf16_products": event.get("bf16_products", bf16)}
            numbers["int8_products"] = event.get("int8_products", False)
            begun = {"step": event["step"], "total_steps": event["total_steps"], **numbers}
            base = event.get("base_sha256") or status.base_sha256
            saved = min(status.checkpoint_step or 0, event["step"]) or None  # newer ones were damaged
            return replace(status, state=RunState.RUNNING, message=None, base_sha256=base, checkpoint_step=saved, **begun)
        case "step":
            figures: dict[str, Any] = {key: event.get(key) for key in _STEP_FIELDS}
            return replace(status, message=None, **figures)
        case "checkpoint":
            return replace(status, checkpoint_step=event["step"])
        case "eval" if event["step"] == 0:
            return replace(status, heldout_loss_before=event["loss"])
        case "eval":
            return replace(status, heldout_loss=event["loss"])
        case "warning":
            # A resumed run says again what it said before.
            warnings = tuple(dict.fromkeys((*status.warnings, event["message"])))
            adapted = {key: event[key] for key in ("halvings", "checkpointing") if key in event}
            return replace(status, warnings=warnings, **adapted)
        case "progress":
            return replace(status, message=event["message"])
        case "stopped":
            return replace(status, state=RunState.STOPPED, step=event["step"], eta_seconds=None)
        case "finished":
            loss = event.get("heldout_loss") or status.heldout_loss
            return replace(status, state=RunState.COMPLETED, eta_seconds=0.0, message=None, heldout_loss=loss)
        case "failed":
            return replace(
                status,
                state=RunState.FAILED,
                eta_seconds=None,
                code=event["code"],
                message=event["message"],
                hint=event.get("hint"),
            )
        case _:
            return status
