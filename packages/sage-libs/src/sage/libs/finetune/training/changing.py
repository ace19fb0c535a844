"""Apply changes of options between two steps. The step of a change is recorded, so that a resumed run repeats the change."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler

from sage.common.training import ChangedEvent, TrainingOptions
from sage.libs.finetune.run.changes import RequestReader, changed, options_at
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.heldout import HeldOut

#: Schedules whose learning rate depends on the total number of steps.
_DECAYING = ("cosine", "linear")


class UnboundedEpochs(Trainer):
    """A Trainer that ends at `state.max_steps`, which can grow during the training. The number of epochs has no limit."""

    def set_initial_training_values(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """Return the Trainer's values. The first value, the number of epochs, is replaced by `sys.maxsize`."""
        return (sys.maxsize, *super().set_initial_training_values(*arguments, **options)[1:])


class OptionChanges:
    """The options of a run, which users can change between two steps."""

    def __init__(
        self, run: RunDirectory, configured: TrainingOptions, recorded: Sequence[ChangedEvent], step: int, heldout: HeldOut
    ) -> None:
        """configured: the original options.  recorded: earlier changes.  step: the step that the run continues from."""
        self._run, self._configured, self._recorded = run, configured, list(recorded)
        self._reader, self._heldout = RequestReader(run), heldout
        self.options = options_at(configured, self._recorded, step + 1)  #: options of the next step
        heldout.patience = self.options.early_stopping_patience

    def begin(self, arguments: TrainingArguments, state: TrainerState, scheduler: LambdaLR) -> None:
        """Use the options from the first step on. Call this once, before the first step."""
        if self._configured.max_steps is None:  # the number of epochs determines the number of steps
            planned = TrainingOptions(max_steps=state.max_steps)
            self._configured, self.options = changed(planned, self._configured), changed(planned, self.options)
        self._use(self.options, arguments, state, scheduler)

    def requested(self, arguments: TrainingArguments, state: TrainerState, scheduler: LambdaLR) -> ChangedEvent | None:
        """If there is a new request, append a ChangedEvent to the run and return the event. Do not apply the change yet."""
        if state.global_step >= state.max_steps:
            return None  # no step is left
        request, last = self._reader.read(), max((change.revision for change in self._recorded), default=0)
        if request is None or request.revision <= last:
            return None
        old, step = self.options_after(state.global_step), state.global_step
        wanted = request.options.model_dump(exclude_none=True)
        if "max_steps" in wanted:
            wanted["max_steps"] = max(wanted["max_steps"], step)
        new = TrainingOptions(**{name: value for name, value in wanted.items() if value != getattr(old, name)})
        event = ChangedEvent(
            step=step + 1,
            revision=request.revision,
            old=TrainingOptions(**{name: getattr(old, name) for name in new.model_dump(exclude_none=True)}),
            new=new,
            message=_message(old, new, arguments, scheduler, step + 1),
        )
        self._run.append_event(event)
        return event

    def apply(
        self, event: ChangedEvent | None, arguments: TrainingArguments, state: TrainerState, scheduler: LambdaLR
    ) -> None:
        """Add `event` to the recorded changes if it is not None. Then apply the options of the next step."""
        if event:
            self._recorded.append(event)
        options = self.options_after(state.global_step)
        if options != self.options:
            self._use(options, arguments, state, scheduler)

    def options_after(self, step: int) -> TrainingOptions:
        """Return the options of the step that follows `step`."""
        return options_at(self._configured, self._recorded, step + 1)

    def _use(self, options: TrainingOptions, arguments: TrainingArguments, state: TrainerState, scheduler: LambdaLR) -> None:
        assert options.learning_rate
        assert options.max_steps
        self.options = options
        self._heldout.patience = options.early_stopping_patience
        state.max_steps = options.max_steps
        reschedule(scheduler, factor_of(arguments, options.max_steps), options.learning_rate)


def factor_of(arguments: TrainingArguments, max_steps: int) -> Any:
    """Return the schedule of the learning rate: a function that maps the number of completed steps to a factor."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = arguments.get_warmup_steps(max_steps)
    return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, max_steps).lr_lambdas[0]


def reschedule(scheduler: LambdaLR, factor: Any, learning_rate: float) -> None:
    """Replace the schedule and the peak learning rate. If the parameter groups have different rates, keep the ratios."""
    groups, bases = scheduler.optimizer.param_groups, scheduler.base_lrs
    if bases[0] != learning_rate:  # if equal, skip the computation, which could change other rates by rounding
        scheduler.base_lrs = [learning_rate * (base / bases[0]) for base in bases]
    scheduler.lr_lambdas = [factor] * len(groups)
    for group, base in zip(groups, scheduler.base_lrs, strict=True):
        group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]  # noqa: SLF001 - torch has no public way to set the rate


def _message(
    old: TrainingOptions, new: TrainingOptions, arguments: TrainingArguments, scheduler: LambdaLR, step: int
) -> str:
    names = new.model_dump(exclude_none=True)
    if not names:
        return "The run already uses the requested options."
    text = f"From step {step} on: " + ", ".join(f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in names)
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    if new.max_steps is None or schedule not in _DECAYING or step > new.max_steps:
        return f"{text}."
    peak, done = changed(old, new).learning_rate or 0.0, scheduler.last_epoch
    rate = peak * factor_of(arguments, new.max_steps)(done)
    return (
        f"{text}. The {schedule} schedule of the learning rate now ends at step {new.max_steps}: "
        f"the learning rate changes from {scheduler.get_last_lr()[0]:.3g} to {rate:.3g}."
    )
