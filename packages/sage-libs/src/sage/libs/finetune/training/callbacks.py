"""The Trainer's callback: it reports progress, saves checkpoints, and stops the run on request."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sage.common.errors import RunError
from sage.common.training import CheckpointEvent, StartedEvent, StepEvent, WarningEvent
from sage.libs.finetune.run.checkpoints import prune, publish
from sage.libs.finetune.run.disk import CheckpointSpace
from sage.libs.finetune.run.eta import ProgressMeter
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.summary import write_summary
from sage.libs.finetune.training.changing import OptionChanges
from sage.libs.finetune.training.heldout import HeldOut
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.finetune.training.memory import peak_bytes, trim_heap, used_bytes
from sage.libs.finetune.training.stopping import StopRequest, StopRequested
from sage.libs.finetune.training.team import Team

logger = logging.getLogger(__name__)
#: Training has diverged if the loss exceeds _DIVERGED * ln(vocabulary size) for _DIVERGED_STEPS steps in a row.
#: ln(vocabulary size) is the loss of random guessing.
_DIVERGED, _DIVERGED_STEPS = 1.5, 10
#: Steps between two calls of `trim_heap`. With a call every 8 steps, a run needs 6 % less memory. A call after each step
#: would make a step 4 % slower.
_TRIM_STEPS = 8


class RunCallback(TrainerCallback):
    """Reports the Trainer's progress to the run directory, and decides when the Trainer saves and stops."""

    def __init__(
        self,
        run: RunDirectory,
        loss: CompletionLoss,
        stop: StopRequest,
        team: Team,
        changes: OptionChanges,
        tokenizer: Any,
        *,
        save_steps: int,
        keep_checkpoints: int,
        keep_best: bool,
        trusted: set[int],
        heldout: HeldOut,
        measure: Callable[[int], float | None],
        started_fields: Callable[[TrainerState], dict[str, Any]],
    ) -> None:
        """Store the arguments.

        tokenizer: saved with each checkpoint, so that a checkpoint can be served.
        save_steps: steps between two checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.  keep_best: also keep the best checkpoint.
        trusted: steps of the checkpoints that this process has verified; steps of new checkpoints are added to the set.
        measure: function that measures the held-out loss after a step.
        started_fields: function that returns fields of the event `started`.
        """
        self.trusted, self.changes = trusted, changes
        self.run, self.loss, self.stop, self.team, self.tokenizer = run, loss, stop, team, tokenizer
        self._save_steps, self._keep_checkpoints, self._keep_best = save_steps, keep_checkpoints, keep_best
        self.heldout, self.measure, self.started_fields = heldout, measure, started_fields

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any,
        lr_scheduler: LambdaLR, **_: Any,
    ) -> TrainerControl:  # fmt: skip
        """Report that training begins, or continues from a checkpoint."""
        self.changes.begin(args, state, lr_scheduler)
        self.guessing_loss, self.diverged_steps = math.log(model.get_input_embeddings().weight.shape[0]), 0
        self.meter = ProgressMeter(state.max_steps - state.global_step)
        trained_bytes = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
        self.space = CheckpointSpace(self.run.path, trained_bytes)
        self.last = time.monotonic()
        self.tokens_seen = int(state.num_input_tokens_seen)
        started = StartedEvent(step=state.global_step, total_steps=state.max_steps, **self.started_fields(state))
        self.run.append_event(started)
        logger.info(
            "training: step %d of %d (precision: %s; kernels: %s)",
            state.global_step,
            state.max_steps,
            started.precision,
            started.kernels,
        )
        event = self.changes.requested(args, state, lr_scheduler) if self.team.is_main_process else None
        self.changes.apply(self.team.broadcast(event), args, state, lr_scheduler)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, lr_scheduler: LambdaLR, **_: Any
    ) -> TrainerControl:
        """Apply requested option changes. Save a checkpoint every `save_steps` steps, on request, and when training ends."""
        if state.global_step % _TRIM_STEPS == 0:
            trim_heap()
        is_requested, ends, event = False, self.stop.requested, None
        if self.team.is_main_process:
            is_requested = self.run.take_checkpoint_request()
            event = self.changes.requested(args, state, lr_scheduler)
            self.changes.apply(event, args, state, lr_scheduler)
            # If an evaluation follows this step, `on_log` decides whether the run ends early.
            is_exhausted = self.heldout.is_exhausted and not self.heldout.is_due(state.global_step)
            ends |= is_exhausted or state.global_step >= state.max_steps
        ends, is_requested, event = self.team.broadcast((ends, is_requested, event))
        if not self.team.is_main_process:
            self.changes.apply(event, args, state, lr_scheduler)
        self.meter.remaining_steps = state.max_steps - state.global_step + 1  # `on_log` then subtracts this step
        control.should_training_stop |= ends
        control.should_save = control.should_training_stop or is_requested or state.global_step % self._save_steps == 0
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Append the event of one step, and measure the held-out loss if a measurement is due.

        Raises RunError if training has diverged. Also raises RunError if the training loss or the gradient norm is NaN or
        infinite.
        """
        state.log_history.clear()  # the history grows with each step, and would be stored in each checkpoint
        if not logs or "loss" not in logs:  # without a loss, `logs` is the Trainer's summary after training
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
                message=f"The loss or the gradient is NaN or infinite at step {state.global_step}.",
                hint="The last checkpoint is kept. Start a new run with a lower --learning-rate.",
            )
        self.diverged_steps = self.diverged_steps + 1 if logs["loss"] > _DIVERGED * self.guessing_loss else 0
        if self.diverged_steps == _DIVERGED_STEPS:
            raise RunError(
                code="loss_exploded",
                message=f"Training has diverged: the loss has been above {_DIVERGED} × ln(vocabulary size) = "
                f"{_DIVERGED * self.guessing_loss:.1f} for {_DIVERGED_STEPS} steps, and is {logs['loss']:.1f} at step "
                f"{state.global_step}.",
                hint="The last checkpoint is kept. Start a new run with a lower --learning-rate.",
            )
        self.meter.closing_seconds = self.heldout.seconds_left(state.global_step, state.max_steps)
        eta, speed = self.meter.eta_seconds, self.meter.tokens_per_second
        self.run.append_event(
            StepEvent(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=state.epoch,
                loss=logs["loss"],
                **shares,
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                tokens_per_second=speed,
                eta_seconds=eta,
                memory_bytes=used_bytes(),
                peak_memory_bytes=peak_bytes(),
            )
        )
        figures = [f"loss {logs['loss']:.4f}"]
        figures += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in shares.items() if value is not None]
        figures += [] if speed is None else [f"{speed:.0f} tokens/s"]
        figures += ["estimating" if eta is None else f"{eta:.0f} s left"]
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(figures))
        if self.heldout.is_due(state.global_step):
            self._score(state.global_step, control)
            self.last = time.monotonic()
        if control.should_save and self.team.is_main_process:
            self.space.check()
        return control

    def _score(self, step: int, control: TrainerControl) -> None:
        ends = saves = False
        if self.team.is_main_process:
            try:
                self.measure(step)
            except StopRequested:
                ends = True
            else:
                ends = self.heldout.is_exhausted
            saves = ends or (self._keep_best and self.heldout.best_step == step)
        ends, saves = self.team.broadcast((ends, saves))
        control.should_training_stop |= ends
        control.should_save |= saves or control.should_training_stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Move the new checkpoint from the Trainer's staging folder into the run directory."""
        assert args.output_dir
        self.team.barrier()  # wait until every process has written its part of the checkpoint
        if self.team.is_main_process:
            self._publish(args, state)
        self.team.barrier()
        return control

    def _publish(self, args: TrainingArguments, state: TrainerState) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.tokenizer.save_pretrained(written)
        checkpoint = publish(written, self.run.path, state.global_step)
        self.space.written(checkpoint.path)
        self.trusted.add(checkpoint.step)
        self.run.append_event(CheckpointEvent(step=checkpoint.step, path=str(checkpoint.path)))
        write_summary(self.run)
        logger.info("checkpoint %s", checkpoint.path)
        best = self.heldout.best_step if self._keep_best else None
        for problem in prune(self.run.path, self._keep_checkpoints, best, self.trusted):
            self.run.append_event(WarningEvent(message=f"A damaged checkpoint is ignored: {problem}"))
