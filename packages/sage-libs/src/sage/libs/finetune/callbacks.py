"""What happens around the steps: progress events, checkpoints, the end by request."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sage.common.errors import RunError
from sage.libs.finetune.checkpoints import prune, publish
from sage.libs.finetune.eta import ProgressMeter
from sage.libs.finetune.loss import CompletionLoss
from sage.libs.finetune.rundir import RunDirectory
from sage.libs.finetune.stopping import StopRequest

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """Tells the run directory what the Trainer does, and the Trainer when to save and when to stop."""

    def __init__(
        self,
        run: RunDirectory,
        loss: CompletionLoss,
        stop: StopRequest,
        *,
        save_steps: int,
        keep_checkpoints: int,
        closing_seconds: float,
        started_fields: Callable[[TrainerState], dict[str, Any]],
    ) -> None:
        self.run, self.loss, self.stop = run, loss, stop
        self.save_steps, self.keep_checkpoints = save_steps, keep_checkpoints
        self.closing_seconds, self.started_fields = closing_seconds, started_fields

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Say that training begins, or goes on."""
        self.meter = ProgressMeter(state.max_steps - state.global_step, self.closing_seconds)
        self.last = time.monotonic()
        self.tokens_seen = int(state.num_input_tokens_seen)
        told = self.started_fields(state)
        self.run.append_event("started", step=state.global_step, total_steps=state.max_steps, **told)
        logger.info(
            "training: step %d of %d (%s; %s)", state.global_step, state.max_steps, told["precision"], told["kernels"]
        )
        return control

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Save every so often, at the end and before a stop."""
        control.should_training_stop |= self.stop.requested
        at_end = control.should_training_stop or state.global_step >= state.max_steps
        control.should_save = at_end or state.global_step % self.save_steps == 0
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Append the event of one step; raises RunError where the loss is no longer a number."""
        if not logs or "loss" not in logs:  # the Trainer's closing summary
            return control
        now = time.monotonic()
        accuracy = self.loss.take_accuracy()
        self.meter.add(int(state.num_input_tokens_seen) - self.tokens_seen, now - self.last)
        self.last, self.tokens_seen = now, int(state.num_input_tokens_seen)
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise RunError(
                code="loss_not_finite",
                message=f"The loss or its gradient is not a number at step {state.global_step}.",
                hint="Its last checkpoint is kept. Start anew with a lower --learning-rate.",
            )
        eta = self.meter.eta_seconds
        self.run.append_event(
            "step",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=logs["loss"],
            token_accuracy=accuracy,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=self.meter.tokens_per_second,
            eta_seconds=eta,
            memory_bytes=_memory_bytes(),
        )
        remaining = "estimating" if eta is None else f"{eta:.0f} s left"
        logger.info(
            "step %d/%d  loss %.4f  accuracy %.1f %%  %.0f tokens/s  %s",
            state.global_step, state.max_steps, logs["loss"], 100 * accuracy, self.meter.tokens_per_second, remaining,
        )  # fmt: skip
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Publish what the Trainer has written aside."""
        assert args.output_dir
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoint = publish(written, self.run.path, state.global_step)
        prune(self.run.path, self.keep_checkpoints)
        self.run.append_event("checkpoint", step=checkpoint.step, path=str(checkpoint.path))
        logger.info("checkpoint %s", checkpoint.path)
        return control


def _memory_bytes() -> int:
    """Return what this process holds now: of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return int(psutil.Process().memory_info().rss)
