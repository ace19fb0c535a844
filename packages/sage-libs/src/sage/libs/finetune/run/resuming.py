"""Find and verify the checkpoint that a run continues from, and check that the base model has not changed."""

from collections.abc import Callable
from pathlib import Path

from sage.common.errors import ModelError, RunError
from sage.libs.finetune.run.checkpoints import Checkpoint, latest_good
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunStatus
from sage.libs.finetune.run.summary import read_status
from sage.libs.models.fingerprint import fingerprint

Warn = Callable[[str], None]


def checkpoint_to_resume(run: RunDirectory, given: str | None, base: Path, warn: Warn) -> Checkpoint | None:
    """Return the checkpoint to continue from: the run's newest intact checkpoint, or else `given`. None: start at step 0.

    given: folder of a checkpoint of another run, or None.  base: folder of the base model.
    Raises RunError if `given` is damaged, or if the checkpoint from which the run was forked is damaged. Raises ModelError
    if the base model has changed.
    """
    checkpoint, problems = latest_good(run.path)
    for problem in problems:
        warn(f"A damaged checkpoint was skipped: {problem}")
    if checkpoint is None and given:
        checkpoint = Checkpoint.of(Path(given))
        checkpoint.verify()
    if checkpoint is None and (forked_at := read_status(run).forked_at_step):
        raise RunError(
            code="checkpoint_damaged",
            message=f"The checkpoint of step {forked_at}, from which this run was forked, is damaged.",
            hint="Fork the original run again.",
        )
    trained_on = begun(run, given).base_sha256 if checkpoint else None
    if trained_on not in (None, fingerprint(base)):
        raise ModelError(
            code="base_changed",
            message=f"The base model in {base} has changed since the run began, so the run cannot be resumed.",
            hint="Restore the old base model, or start a new run.",
            param="base_model",
        )
    return checkpoint


def begun(run: RunDirectory, given: str | None) -> RunStatus:
    """Return the status of `run`. If `run` has not trained yet, return the status of the run that wrote `given`."""
    status = read_status(run)
    if status.bf16 is None and given:
        origin = RunDirectory(Path(given).resolve().parent)
        return read_status(origin)
    return status


def best_checkpoint(run: RunDirectory, step: int, warn: Warn) -> Checkpoint | None:
    """Return the checkpoint of a step; if the checkpoint is damaged, warn and return None."""
    best = Checkpoint(run.path / f"checkpoint-{step}", step)
    try:
        best.verify()
    except RunError as error:
        warn(
            "The weights of the last step are saved as the result, because the checkpoint with the lowest loss "
            f"(step {step}) cannot be used: {error.message}"
        )
        return None
    return best
