"""Create a run that continues from a checkpoint of another run, with the same or other options."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sage.common.errors import ConfigError, NotFound, RunError
from sage.common.training import (
    AnyRunEvent,
    CheckpointEvent,
    EvalEvent,
    ForkedEvent,
    SampleEvent,
    StartedEvent,
    StepEvent,
    WarningEvent,
)
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.changes import configured_options, options_at, recorded_changes
from sage.libs.finetune.run.checkpoints import Checkpoint, list_checkpoints
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec

#: Options that a fork can change. Other options determine the data, the order of the samples, or which weights are trained.
_CHANGEABLE = (
    "output_dir", "learning_rate", "lr_scheduler", "warmup_steps", "max_grad_norm", "max_steps", "eval_steps",
    "early_stopping_patience", "sample_prompts", "keep_best", "save_steps", "keep_checkpoints", "beta",
)  # fmt: skip
#: A new run copies events of these types if the original run recorded them before the checkpoint.
_KEPT = (StartedEvent, StepEvent, EvalEvent, SampleEvent, WarningEvent)


def fork_spec(parent: RunDirectory, task_id: str, checkpoint: Checkpoint, options: Mapping[str, Any]) -> RunSpec:
    """Return the spec of the new run: the options that the original run used at the checkpoint, updated with `options`.

    Raises ConfigError if one of the options cannot be changed, or if no step is left to train.
    """
    spec, step = parent.read_spec(), checkpoint.step
    if fixed := sorted(set(options) - set(_CHANGEABLE)):
        raise _refused(
            f"A fork cannot change {', '.join(fixed)}.",
            f"A fork can change {', '.join(_CHANGEABLE)}. For other options, start a new run.", fixed[0],
        )  # fmt: skip
    if spec.config.streaming and "max_steps" in options:
        raise _refused("A fork cannot change max_steps of a run with streaming.", "Omit max_steps.", "max_steps")
    used = options_at(configured_options(spec.config), recorded_changes(parent), step)
    given = {**used.model_dump(exclude_none=True), "resume_from_checkpoint": None, **options}
    given["early_stopping_patience"] = given["early_stopping_patience"] or None
    config = validated(FinetuneConfig, {**spec.config.model_dump(mode="json"), **given})
    total_steps = config.max_steps or checkpoint.total_steps()
    if step >= total_steps:
        message = f"A fork from step {step} has no step left to train, because the run has {total_steps} steps in total."
        raise _refused(message, f"Set max_steps to more than {step}.", "max_steps")
    return replace(spec, task_id=task_id, config=config, forked_from={"task_id": spec.task_id, "step": step})


def checkpoint_to_fork(parent: RunDirectory, step: int | None) -> Checkpoint:
    """Return the checkpoint of a step, or the newest checkpoint if `step` is None. Raises NotFound."""
    found = list_checkpoints(parent.path)
    for checkpoint in reversed(found):
        if step in (None, checkpoint.step):
            return checkpoint
    kept = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise NotFound(
        code="checkpoint_not_found",
        message=f"The run {parent.path.name} has no checkpoint{'' if step is None else f' of step {step}'}.",
        hint=f"The run has checkpoints of the steps {kept}." if kept else "Wait until the run has saved a checkpoint.",
        param="step",
    )


def copy_history(parent: RunDirectory, checkpoint: Checkpoint, child: RunDirectory) -> None:
    """Write the checkpoint and the events up to the checkpoint into the folder of the new run.

    The checkpoint's files are hard links, or copies if the file system has no hard links. Therefore these files remain if
    the original run removes the checkpoint.
    Raises NotFound if the original run has removed the checkpoint, and RunError if the checkpoint is damaged.
    """
    target = child.path / checkpoint.path.name
    try:
        shutil.copytree(checkpoint.path, target, copy_function=_link)
    except OSError as error:
        if checkpoint.path.exists():
            raise
        raise NotFound(
            code="checkpoint_not_found",
            message=f"The run {parent.path.name} has removed its checkpoint of step {checkpoint.step}.",
            hint="Fork a newer checkpoint, or omit the step to use the newest one.",
            param="step",
        ) from error
    try:
        Checkpoint(target, checkpoint.step).verify()
    except RunError as error:
        raise RunError(code=error.code, message=error.message, hint="Fork the checkpoint of another step.") from error
    child.copy_events(_history(parent, checkpoint.step))
    child.append_event(CheckpointEvent(step=checkpoint.step))
    child.append_event(ForkedEvent(step=checkpoint.step, parent=parent.path.name))


def _history(parent: RunDirectory, step: int) -> Iterator[AnyRunEvent]:
    """Yield the events that the original run recorded before the checkpoint of `step`, if their type is in `_KEPT`."""
    saved = [end for event, end in parent.read_events() if isinstance(event, CheckpointEvent) and event.step == step]
    for event, end in parent.read_events():
        if saved and end >= saved[-1]:
            return
        if isinstance(event, _KEPT) and getattr(event, "step", 0) <= step:
            yield event


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # for example, a file system without hard links
        shutil.copy2(source, target)
    return target


def _refused(message: str, hint: str, param: str) -> ConfigError:
    return ConfigError(code="fork_refused", message=message, hint=hint, param=param)
