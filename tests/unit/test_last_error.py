"""Errors that a run reports when it fails: they name the file or disk, and the next step."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
from support import SAMPLES

from sage.common.errors import SageError
from sage.libs.finetune import worker
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec

Usage = namedtuple("Usage", "free")
ROOMY = 10**12


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "out").mkdir()
    config = FinetuneConfig(base_model="m", dataset_path=str(SAMPLES), output_dir=str(tmp_path / "out"))
    run = RunDirectory(tmp_path / "run")
    run.create(RunSpec("task-a", config, "", ""))
    return run


def reported(error: Exception, run: RunDirectory) -> SageError:
    return worker._reported(error, run)


@pytest.mark.parametrize("full", ["run", "out"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), RuntimeError("I/O error: No space left on device")])
def test_the_error_names_the_disk_that_is_full(
    error: Exception, full: str, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.shutil, "disk_usage", lambda path: Usage(17 * 2**20 if path.name == full else ROOMY))
    assert reported(error, run).code == "disk_full"
    assert f"The disk of {tmp_path / full} is full" in reported(error, run).message


def test_the_error_names_the_unusable_file_and_the_next_step(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.shutil, "disk_usage", lambda _: Usage(0))  # the disk is full, but this is not the cause
    error = reported(OSError(errno.EROFS, os.strerror(errno.EROFS), "/out/.partial"), run)
    assert error.message.startswith("/out/.partial cannot be used: Read-only file system.")
    assert "then `resume`" in error.hint
