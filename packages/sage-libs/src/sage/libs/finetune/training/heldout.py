"""Measure the held-out loss of a run, find the best step, and decide on early stopping."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from sage.common.training import EvalEvent
from sage.libs.finetune.data.tokenizing import Encoded
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.batching import Collator
from sage.libs.finetune.training.evaluation import heldout_loss
from sage.libs.finetune.training.loss import CompletionLoss

logger = logging.getLogger(__name__)


class HeldOut:
    """Measures the held-out loss. The events of the run contain the losses that the run's earlier processes measured."""

    def __init__(
        self,
        run: RunDirectory,
        samples: Sequence[Encoded],
        check: Callable[[], None],
        *,
        batch_size: int,
        eval_steps: int | None,
        patience: int | None,
    ) -> None:
        """Read earlier measurements from the run's events.

        samples: the held-out samples, or [].  check: called before each batch. If `check` raises, the measurement ends.
        eval_steps: steps between two measurements; None: measure only before and after training.
        patience: number of measurements without improvement after which the run ends; None or 0: no early stopping.
        """
        self.run, self.samples, self._check = run, samples, check
        self._batch_size, self._eval_steps = batch_size, eval_steps
        self.patience = patience  #: the argument `patience`; can be changed during the training
        scored = [event for event, _ in run.read_events() if isinstance(event, EvalEvent)]
        self.losses: dict[int, float] = {event.step: event.loss for event in scored}  #: losses in nats per token, by step
        self._seconds = scored[-1].seconds if scored else 0.0

    def discard_after(self, step: int) -> None:
        """Discard the losses of all steps after `step`, because the run resumes at `step` and measures the losses again."""
        self.losses = {at: loss for at, loss in self.losses.items() if at <= step}

    def measure(self, step: int, model: Any, collator: Collator, loss_function: CompletionLoss) -> float | None:
        """Return the held-out loss after a step, or None if there are no samples. A known loss is not measured again."""
        if not self.samples:
            return None
        if step not in self.losses:
            began = time.monotonic()
            loss = heldout_loss(model, self.samples, collator, loss_function, self._batch_size, self._check)
            self._seconds = time.monotonic() - began
            self.run.append_event(EvalEvent(step=step, loss=loss, samples=len(self.samples), seconds=self._seconds))
            logger.info("held-out loss %.4f at step %d", loss, step)
            self.losses[step] = loss
        return self.losses[step]

    def is_due(self, step: int) -> bool:
        """Return whether the loss must be measured after a step."""
        return self._eval_steps is not None and step % self._eval_steps == 0

    @property
    def best_step(self) -> int | None:
        """The earliest step with the lowest loss so far. The loss before training (step 0) is ignored."""
        trained = {step: loss for step, loss in self.losses.items() if step}
        return min(trained, key=lambda step: (trained[step], step), default=None)

    @property
    def is_exhausted(self) -> bool:
        """Whether the loss has not improved in the last `patience` measurements.

        Without early stopping, the value is False.
        """
        patience, best = self.patience, self.best_step
        return bool(patience and best is not None and sum(step > best for step in self.losses) >= patience)

    def seconds_left(self, step: int, total_steps: int) -> float:
        """Return the estimated seconds that all measurements after `step` take."""
        between = (total_steps // self._eval_steps - step // self._eval_steps) if self._eval_steps else 0
        at_end = 0 if self.is_due(total_steps) else 1
        return (between + at_end) * self._seconds
