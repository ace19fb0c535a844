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
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.checkpoints import prune, publish
from sage.libs.finetune.run.eta import ProgressMeter
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.heldout import HeldOut
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.finetune.training.memory import trim_heap
from sage.libs.finetune.training.stopping import StopRequest, StopRequested
from sage.libs.finetune.training.team import Team

logger = logging.getLogger(__name__)
#: Training has diverged where the loss is this many times that of guessing, for so many steps in a row.
_ASTRAY, _ASTRAY_STEPS = 1.5, 10
#: Memory is given back every so many steps: at each of them it would take 4 % of the time, at every eighth 6 % less is held.
_TIDY_STEPS = 8


class RunCallback(TrainerCallback):
    """Tells the run directory what the Trainer does, and the Trainer when to save and when to stop."""

    def __init__(
        self,
        run: RunDirectory,
        config: FinetuneConfig,
        loss: CompletionLoss,
        stop: StopRequest,
        team: Team,
        *,
        trusted: set[int],
        heldout: HeldOut,
        measure: Callable[[int], float | None],
        started_fields: Callable[[TrainerState], dict[str, Any]],
    ) -> None:
        """Take what the callback needs.

        trusted: steps whose checkpoints this process has verified; those that it writes are added.
        measure: scores the held-out samples after a step; started_fields: reported when training begins.
        """
        self.trusted = trusted
        self.run, self.config, self.loss, self.stop, self.team = run, config, loss, stop, team
        self.heldout, self.measure, self.started_fields = heldout, measure, started_fields

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> TrainerControl:
        """Say that training begins, or goes on."""
        self.guessing_loss, self.steps_astray = math.log(model.get_input_embeddings().weight.shape[0]), 0
        self.meter = ProgressMeter(state.max_steps - state.global_step)
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
        if state.global_step % _TIDY_STEPS == 0:
            trim_heap()
        control.should_training_stop |= self.team.agree(self.stop.requested)
        at_end = control.should_training_stop or state.global_step >= state.max_steps
        control.should_save = at_end or state.global_step % self.config.save_steps == 0
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Append the event of one step, and score where that is due; raises RunError where training has gone astray."""
        state.log_history.clear()  # else it grows by an entry a step, and is part of every checkpoint
        if not logs or "loss" not in logs:  # the Trainer's closing summary
            return control
        now = time.monotonic()
        trained, correct = self.team.total(self.loss.take_counts())
        shares = {
            "token_accuracy": correct / trained if trained else None,
            "reward": logs.get("reward"),
            "reward_accuracy": logs.get("rewards/accuracies"),
        }
        self.meter.add(int(state.num_input_tokens_seen) - self.tokens_seen, now - self.last)
        self.last, self.tokens_seen = now, int(state.num_input_tokens_seen)
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise RunError(
                code="loss_not_finite",
                message=f"The loss or its gradient is not a number at step {state.global_step}.",
                hint="Its last checkpoint is kept. Start anew with a lower --learning-rate.",
            )
        self.steps_astray = self.steps_astray + 1 if logs["loss"] > _ASTRAY * self.guessing_loss else 0
        if self.steps_astray == _ASTRAY_STEPS:
            raise RunError(
                code="loss_exploded",
                message=f"The loss has been far above that of guessing ({self.guessing_loss:.1f}) for {_ASTRAY_STEPS} "
                f"steps, and is {logs['loss']:.1f} at step {state.global_step}: training has diverged.",
                hint="Its last checkpoint is kept. Start anew with a lower --learning-rate.",
            )
        self.meter.closing_seconds = self.heldout.seconds_left(state.global_step, state.max_steps)
        eta, speed = self.meter.eta_seconds, self.meter.tokens_per_second
        self.run.append_event(
            "step",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=logs["loss"],
            **shares,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=speed,
            eta_seconds=eta,
            memory_bytes=_memory_bytes(),
        )
        told = [f"loss {logs['loss']:.4f}"]
        told += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in shares.items() if value is not None]
        told += [] if speed is None else [f"{speed:.0f} tokens/s"]
        told += ["estimating" if eta is None else f"{eta:.0f} s left"]
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(told))
        if self.heldout.is_due(state.global_step):
            self._score(state.global_step, control)
            self.last = time.monotonic()
        return control

    def _score(self, step: int, control: TrainerControl) -> None:
        """Score the held-out samples, and have saved what is the best, or the last for want of progress."""
        ends = saves = False
        if self.team.leads:
            try:
                self.measure(step)
            except StopRequested:
                ends = True
            else:
                ends = self.heldout.is_exhausted
            saves = ends or (self.config.keep_best and self.heldout.best_step == step)
        ends, saves = self.team.agree((ends, saves))
        control.should_training_stop |= ends
        control.should_save |= saves or control.should_training_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Publish what the Trainer has written aside."""
        assert args.output_dir
        self.team.wait()  # each has written what is its own
        if self.team.leads:
            self._publish(args, state)
        self.team.wait()
        return control

    def _publish(self, args: TrainingArguments, state: TrainerState) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoint = publish(written, self.run.path, state.global_step)
        self.trusted.add(checkpoint.step)
        self.run.append_event("checkpoint", step=checkpoint.step, path=str(checkpoint.path))
        logger.info("checkpoint %s", checkpoint.path)
        best = self.heldout.best_step if self.config.keep_best else None
        for problem in prune(self.run.path, self.config.keep_checkpoints, best, self.trusted):
            self.run.append_event("warning", message=f"A damaged checkpoint is passed over: {problem}")


def _memory_bytes() -> int:
    """Return what this process holds now: of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return int(psutil.Process().memory_info().rss)
