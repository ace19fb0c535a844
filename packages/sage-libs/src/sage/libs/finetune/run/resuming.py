"""Where a run goes on: the checkpoint, verified, and the base model that it was trained on."""

from collections.abc import Callable
from pathlib import Path

from sage.common.errors import ModelError, RunError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.checkpoints import Checkpoint, latest_good
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunStatus, fold
from sage.libs.models.fingerprint import fingerprint

Warn = Callable[[str], None]


def checkpoint_to_resume(run: RunDirectory, config: FinetuneConfig, base: Path, warn: Warn) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from: its own newest, else the one that it was given; None at the beginning.

    base: the folder of the base model.
    Raises RunError if the given one is damaged, ModelError if the base is not the one that it was trained on.
    """
    checkpoint, problems = latest_good(run.path)
    for problem in problems:
        warn(f"A damaged checkpoint is passed over: {problem}")
    if checkpoint is None and config.resume_from_checkpoint:
        checkpoint = Checkpoint.of(Path(config.resume_from_checkpoint))
        checkpoint.verify()
    trained_on = begun(run, config).base_sha256 if checkpoint else None
    if trained_on not in (None, fingerprint(base)):
        raise ModelError(
            code="base_changed",
            message=f"The base model in {base} has changed since the run began, so it cannot go on exactly.",
            hint="Put the old model back, or start a new run.",
            param="base_model",
        )
    return checkpoint


def begun(run: RunDirectory, config: FinetuneConfig) -> RunStatus:
    """Return what is known of a run, or, before its first step, of the one whose checkpoint it goes on from."""
    status = fold(RunStatus(), run.read_events()[0])
    if status.bf16 is None and config.resume_from_checkpoint:
        origin = RunDirectory(Path(config.resume_from_checkpoint).resolve().parent)
        return fold(RunStatus(), origin.read_events()[0])
    return status


def best_checkpoint(run: RunDirectory, step: int, warn: Warn) -> Checkpoint | None:
    """Return the checkpoint with the best score, or None, with a warning, if it is damaged."""
    best = Checkpoint(run.path / f"checkpoint-{step}", step)
    try:
        best.verify()
    except RunError as error:
        warn(f"The result is that of the last step, not of step {step}, which scored best: {error.message}")
        return None
    return best
