"""The output folder of a run: whose it is, checked before anything is written into it."""

import json
import os
from pathlib import Path
from typing import Any

from sage.common.errors import OutputError
from sage.common.processes import holder
from sage.libs.finetune.rundir import RunDirectory, replace_file
from sage.libs.finetune.status import ALIVE, RunStatus, fold

RUN_FILE = "sage_run.json"


def claim_output(output: Path, task_id: str, run: Path) -> None:
    """Make the output folder and write down which run it belongs to.

    Raises OutputError where it cannot be written, holds someone else's files, or the result of another run.
    """
    owner = read_run_file(output)
    if owner.get("task_id") != task_id:
        _check_free(output, owner)
    try:
        output.mkdir(parents=True, exist_ok=True)
        replace_file(output / RUN_FILE, json.dumps({"task_id": task_id, "run": str(run)}, indent=2).encode())
    except OSError as error:
        raise _refused(output, f"cannot be written: {error.strerror}") from error


def read_run_file(output: Path) -> dict[str, Any]:
    """Return what a run left in its output folder, or {} where there is none."""
    try:
        content = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_free(output: Path, owner: dict[str, Any]) -> None:
    if output.exists() and not output.is_dir():
        raise _refused(output, "is a file")
    if not output.is_dir():
        return
    if not os.access(output, os.W_OK | os.X_OK):
        raise _refused(output, "cannot be written: Permission denied")
    others = sorted(entry.name for entry in output.iterdir() if entry.name != RUN_FILE)
    if owner and any((output / name).exists() for name in ("adapter_config.json", "config.json")):
        raise _refused(output, f"holds the result of {owner.get('task_id')}")
    if others:
        raise _refused(output, f"is not empty: it holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}")
    if owner and _is_live(RunDirectory(Path(str(owner.get("run"))))):
        raise _refused(output, f"is being written by {owner.get('task_id')}")


def _is_live(run: RunDirectory) -> bool:
    """Return whether a run may still write; one that has said its last word only closes its process."""
    events, _ = run.read_events()
    return holder(run.lock_path) is not None and fold(RunStatus(), events).state in ALIVE


def _refused(output: Path, problem: str) -> OutputError:
    return OutputError(
        code="output_unusable",
        message=f"The output folder {output} {problem}.",
        hint="Give a new or empty folder with --output.",
        param="output_dir",
    )
