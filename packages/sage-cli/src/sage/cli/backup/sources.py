"""Find the files that a backup contains."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sage.common.paths import get_user_paths
from sage.common.settings import DATABASE
from sage.libs.finetune.run.checkpoints import list_checkpoints
from sage.libs.finetune.run.output import read_run_file
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunState
from sage.libs.finetune.run.summary import read_status

#: Files that belong to running processes or can be created again, and the database, which is copied separately.
_TEMPORARY = frozenset({
    "gateway.json", "port", "summary.json", "checkpoint-request", ".reserve",
    DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal",
})  # fmt: skip
_TEMPORARY_SUFFIXES = (".lock", ".partial")


@dataclass(frozen=True)
class Source:
    """Files of one folder."""

    name: str  #: name of the folder in the archive
    folder: Path
    files: tuple[Path, ...]
    is_checkpoint: bool = False  #: True: the files are useful only together


def settings_and_state() -> Iterator[Source]:
    """Yield the settings folder and the state folder, without the database."""
    paths = get_user_paths()
    for name, folder in (("config", paths.config_dir), ("state", paths.state_dir)):
        yield Source(name, folder, files_below(folder))


def run_directories(*, all_checkpoints: bool) -> Iterator[Source]:
    """Yield the run directories.

    If a run is not completed, also yield its newest checkpoint, so that the run can be resumed.

    all_checkpoints: whether to include all checkpoints of all runs.
    """
    for run in _runs():
        name = f"runs/{run.path.name}"
        yield Source(name, run.path, files_below(run.path, ("staging", "checkpoint-*", "damaged-*")))
        checkpoints = list_checkpoints(run.path)
        if not all_checkpoints:
            checkpoints = [] if _is_completed(run) else checkpoints[-1:]
        for checkpoint in checkpoints:
            files = files_below(checkpoint.path)
            yield Source(f"{name}/{checkpoint.path.name}", checkpoint.path, files, is_checkpoint=True)


def output_folders() -> list[Source]:
    """Return the output folders that contain the result of a run."""
    outputs = []
    for run in _runs():
        folder = Path(json.loads(run.spec_path.read_text(encoding="utf-8"))["config"]["output_dir"])
        if read_run_file(folder).get("task_id") == run.path.name and len(files := files_below(folder)) > 1:
            outputs.append(Source(f"outputs/{run.path.name}", folder, files))
    return outputs


def _runs() -> list[RunDirectory]:
    return [RunDirectory(spec.parent) for spec in sorted(get_user_paths().finetuned_dir.glob("*/spec.json"))]


def _is_completed(run: RunDirectory) -> bool:
    try:
        return read_status(run).state is RunState.COMPLETED
    except (ValueError, KeyError, TypeError, AttributeError):  # the run's event file has an invalid line
        return False


def files_below(folder: Path, omitted: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """Return the files below a folder, without temporary files.

    omitted: glob patterns. Entries of the folder that match one of the patterns are skipped.
    """
    entries = [entry for entry in sorted(folder.glob("*")) if not any(entry.match(pattern) for pattern in omitted)]
    files = [file for entry in entries for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
    return tuple(file for file in files if file.is_file() and not _is_temporary(file.name))


def _is_temporary(name: str) -> bool:
    return name in _TEMPORARY or name.endswith(_TEMPORARY_SUFFIXES)
