"""Write checkpoints atomically, and verify their checksums before they are loaded."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sage.common.errors import ConfigError, NotFound, RunError
from sage.common.files import fsync_path, fsync_tree
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DAMAGED = "damaged-"
#: Error codes for a file that is missing or permanently unreadable. After other errors, the checkpoint can be intact.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
#: Options whose values `check_can_continue` does not compare directly. Some of these options do not change the result. The
#: others are compared in another way: for example, datasets are compared by their hashes.
_CHANGEABLE = frozenset({
    "base_model", "dataset_path", "output_dir", "num_epochs", "max_steps", "save_steps", "keep_checkpoints",
    "resume_from_checkpoint", "reward_file", "eval_path", "eval_steps", "early_stopping_patience", "sample_prompts",
    "keep_best", "gradient_checkpointing", "report_to",
})  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    step: int

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """Return the checkpoint in a folder; raises NotFound if the folder has no readable manifest."""
        try:
            return cls(folder, int(json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["step"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NotFound(
                code="checkpoint_not_found",
                message=f"{folder} is not a checkpoint of a run: it has no readable {_MANIFEST}.",
                hint="Give a folder named checkpoint-STEP in a run's directory.",
                param="resume_from_checkpoint",
            ) from error

    def verify(self) -> None:
        """Raise RunError if a file is missing, or if a file's checksum differs from the checksum in the manifest."""
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
            for name, expected in manifest["files_sha256"].items():
                if _sha256(self.path / name) != expected:
                    raise _damaged(f"{self.path / name} is damaged: its checksum differs from the checksum in the manifest.")
        except OSError as error:
            if error.errno not in _LOST:
                raise
            raise _damaged(f"{error.filename or self.path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(f"{self.path / _MANIFEST} is not readable.") from error

    def total_steps(self) -> int:
        """Return the total number of steps of the checkpoint's run."""
        try:
            return int(json.loads((self.path / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(f"{self.path}/trainer_state.json is not readable.") from error

    def set_aside(self) -> None:
        """Rename a damaged checkpoint, so that `list_checkpoints` no longer returns it."""
        target = self.path.with_name(_DAMAGED + self.path.name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.path, target)
        fsync_path(self.path.parent)

    def check_can_continue(self, config: FinetuneConfig, dataset_sha256: str, base: Callable[[str], Path]) -> None:
        """Raise ConfigError if a run with this config and data would not have the same result as the checkpoint's run.

        ConfigError is also raised if no step is left to train.  base: returns the folder of a base model, given its name.
        """
        origin = self._origin()
        found, wanted = origin.config, config
        differing = [
            name
            for name in type(config).model_fields
            if name not in _CHANGEABLE and getattr(found, name) != getattr(wanted, name)
        ]
        if found.base_model != wanted.base_model and base(found.base_model) != base(wanted.base_model):
            differing.append("base_model")
        weights = [[source.weight for source in each.sources] for each in (found, wanted)]
        if origin.dataset_sha256 != dataset_sha256 or weights[0] != weights[1]:
            differing.append("dataset_path")
        total_steps = self.total_steps()
        if wanted.max_steps and wanted.max_steps != total_steps:
            differing.append("max_steps")
        if not wanted.max_steps and (found.max_steps or found.num_epochs != wanted.num_epochs):
            differing.append("num_epochs")
        if differing:
            raise _mismatch(f"{self.path} belongs to a run that differs from the new run in {', '.join(sorted(differing))}")
        if self.step >= total_steps:
            raise _mismatch(f"{self.path} is at step {self.step} of {total_steps}: no step is left to train")

    def _origin(self) -> RunSpec:
        try:
            return RunDirectory(self.path.resolve().parent).read_spec()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _mismatch(f"The spec.json of the run that saved {self.path} cannot be read") from error


def publish(written: Path, run: Path, step: int) -> Checkpoint:
    """Add checksums to the folder `written`, sync the folder, and move it to `checkpoint-<step>` in the folder `run`.

    If an intact checkpoint of this step exists already, the existing checkpoint is kept, because both have the same content.
    """
    files = {str(f.relative_to(written)): _sha256(f) for f in sorted(written.rglob("*")) if f.is_file()}
    (written / _MANIFEST).write_text(json.dumps({"step": step, "files_sha256": files}, indent=1), encoding="utf-8")
    fsync_tree(written)
    checkpoint = Checkpoint(run / f"checkpoint-{step}", step)
    if checkpoint.path.exists():
        try:
            checkpoint.verify()
        except RunError:
            checkpoint.set_aside()
        else:
            shutil.rmtree(written)
            return checkpoint
    os.replace(written, checkpoint.path)
    fsync_path(run)
    return checkpoint


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [Checkpoint(path, step) for step, path in sorted(found) if (path / _MANIFEST).is_file()]


def latest_good(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest intact checkpoint, and rename the damaged checkpoints that are newer.

    Returns a pair: the intact checkpoint (None: no checkpoint is intact), and the problems of the damaged checkpoints.
    """
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        if problem := _problem(checkpoint):
            problems.append(problem)
        else:
            return checkpoint, problems
    return None, problems


def prune(run: Path, keep: int, best_step: int | None = None, trusted: Collection[int] = ()) -> list[str]:
    """Remove all checkpoints except the `keep` newest intact checkpoints and the checkpoint of step `best_step`.

    Damaged checkpoints among the newest checkpoints are renamed, and their problems are returned.
    trusted: steps of checkpoints that are not verified again, because this process has written or verified them.
    """
    kept, problems = 0, list[str]()
    for checkpoint in reversed(list_checkpoints(run)):
        if kept >= keep:
            if checkpoint.step != best_step:
                shutil.rmtree(checkpoint.path)
        elif checkpoint.step not in trusted and (problem := _problem(checkpoint)):
            problems.append(problem)
        else:
            kept += 1
    return problems


def _problem(checkpoint: Checkpoint) -> str:
    try:
        checkpoint.verify()
    except RunError as error:
        checkpoint.set_aside()
        return f"{checkpoint.path.name} (now {_DAMAGED}{checkpoint.path.name}): {error.message}"
    return ""


def _damaged(message: str) -> RunError:
    return RunError(
        code="checkpoint_damaged", message=message, hint="`resume` uses the run's newest intact checkpoint, if there is one."
    )


def _mismatch(message: str) -> ConfigError:
    return ConfigError(
        code="checkpoint_mismatch",
        message=f"{message}; the new run cannot continue from this checkpoint.",
        hint="To train on other data or for another number of steps, omit resume_from_checkpoint and use the "
        "output folder of the checkpoint's run as the base model: `sage llm engine start OUTPUT --engine-kind finetune`.",
        param="resume_from_checkpoint",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
