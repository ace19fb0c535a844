"""Checkpoints that are complete or absent, and are checked before they are trusted."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sage.common.errors import RunError
from sage.libs.finetune.rundir import fsync_tree

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    step: int

    def verify(self) -> None:
        """Raise RunError where a file is missing or differs from what was written."""
        manifest = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files_sha256"].items():
            file = self.path / name
            if not file.is_file() or _sha256(file) != expected:
                raise RunError(
                    code="checkpoint_damaged",
                    message=f"{file} is missing or differs from what was saved.",
                    hint="An older checkpoint of the run is used where there is one.",
                )


def publish(written: Path, run: Path, step: int) -> Checkpoint:
    """Turn a folder that was written aside into `checkpoint-<step>` of a run: summed, synced, renamed."""
    files = {str(f.relative_to(written)): _sha256(f) for f in sorted(written.rglob("*")) if f.is_file()}
    (written / _MANIFEST).write_text(json.dumps({"step": step, "files_sha256": files}, indent=1), encoding="utf-8")
    fsync_tree(written)
    target = run / f"checkpoint-{step}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(written, target)
    _fsync_folder(run)
    return Checkpoint(target, step)


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [Checkpoint(path, step) for step, path in sorted(found) if (path / _MANIFEST).is_file()]


def latest_good(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and what was wrong with newer ones."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            checkpoint.verify()
        except (RunError, ValueError, KeyError, OSError) as error:
            problems.append(f"{checkpoint.path.name}: {error}")
        else:
            return checkpoint, problems
    return None, problems


def prune(run: Path, keep: int, best_step: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints and the best one."""
    for checkpoint in list_checkpoints(run)[:-keep]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
