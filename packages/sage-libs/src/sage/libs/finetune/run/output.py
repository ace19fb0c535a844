"""Ownership of output folders: a run writes its result into a folder only if it owns the folder."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sage.common.errors import OutputError
from sage.common.files import replace_file
from sage.common.processes import holder
from sage.common.shortages import is_shortage
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import ALIVE, RunState, derive
from sage.libs.finetune.run.summary import read_status

RUN_FILE = "sage_run.json"


def claim_output(output: Path, task_id: str, run: Path) -> None:
    """Claim the output folder: create the folder if necessary, and record the run as the owner of the folder.

    A run claims its folder when the run is created, and can claim the same folder again. If the run ends without a result,
    another run can claim the folder. If several runs claim a folder at once, only one run succeeds.
    Raises OutputError if the folder cannot be written, has another run's result, is used by another run, or is not empty.
    """
    output = output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            owner = read_run_file(output)
            if owner.get("task_id") != task_id:
                _check_free(output, owner)
                _write(output, {"task_id": task_id, "run": str(run)})
    except FileExistsError as error:
        raise _refused(output, "is a file") from error
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        if is_shortage(error):
            hint = "Try again, or raise the limit of open files (`ulimit -n`)."
            raise _refused(output, problem, code="output_unavailable", hint=hint) from error
        raise _refused(output, problem) from error


def check_claim(output: Path, task_id: str) -> None:
    """Raise OutputError if the output folder exists, but the run cannot claim the folder."""
    owner = read_run_file(output.resolve())
    if owner.get("task_id") != task_id and output.is_dir():
        _check_free(output.resolve(), owner)


def check_owner(output: Path, task_id: str) -> None:
    """Raise OutputError if another run owns the output folder now."""
    if (owner := read_run_file(output).get("task_id", task_id)) != task_id:
        raise _refused(output, f"now belongs to {owner}")


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the record of a run into its output folder. Raises OutputError if another run owns the folder now."""
    with _locked(output):
        check_owner(output, record["task_id"])
        _write(output, record)


def read_run_file(output: Path) -> dict[str, Any]:
    """Return the record that a run wrote into its output folder, or {} if the folder has no valid record."""
    try:
        content = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if is_shortage(error):  # the file possibly exists and names another run as the owner
            raise
        return {}
    return content if isinstance(content, dict) else {}


def _write(output: Path, record: dict[str, Any]) -> None:
    replace_file(output / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode(), mode=0o600)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder itself during the `with` block, if the file system supports locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_free(output: Path, owner: dict[str, Any]) -> None:
    if not os.access(output, os.W_OK | os.X_OK):
        raise _refused(output, "cannot be written: Permission denied")
    own = (RUN_FILE, f".{RUN_FILE}.partial")  # names of incomplete run files begin with `.sage_run.json.partial`
    others = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith(own))
    if owner and any((output / name).exists() for name in ("adapter_config.json", "config.json")):
        raise _refused(output, f"contains the result of the run {owner.get('task_id')}")
    if others:
        raise _refused(output, f"is not empty: it contains {', '.join(others[:3])}{' …' if len(others) > 3 else ''}")
    if owner and (use := _claim_of(RunDirectory(Path(str(owner.get("run")))))):
        raise _refused(output, f"{use} {owner.get('task_id')}")


def _claim_of(run: RunDirectory) -> str:
    if not run.spec_path.is_file():
        return ""
    state = derive(read_status(run), alive=holder(run.lock_path) is not None).state
    if state is RunState.CREATED:
        return "is claimed by a run that has not started yet:"
    return "is being written by" if state in ALIVE else ""


def _refused(
    output: Path, problem: str, *, code: str = "output_unusable", hint: str = "Specify a new or empty folder with --output."
) -> OutputError:
    return OutputError(code=code, message=f"The output folder {output} {problem}.", hint=hint, param="output_dir")
