"""Runs that continue from a checkpoint of another run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import HELDOUT
from training import TinyRun

from sage.common.errors import ConfigError, NotFound, RunError, SageError
from sage.libs.finetune.run.checkpoints import Checkpoint
from sage.libs.finetune.run.status import RunState

OPTIONS: dict[str, Any] = {"save_steps": 4, "keep_checkpoints": 9}


def forked(parent: TinyRun, step: int | None, output: Path, **options: Any) -> TinyRun:
    """Fork a run, and train the fork in this process."""
    fork = object.__new__(TinyRun)
    fork.manager, fork.output = parent.manager, output
    fork.task_id = parent.manager.fork(parent.task_id, step, {"output_dir": str(output), **options})
    fork.config = parent.manager.run_directory(fork.task_id).read_spec().config
    assert fork.status.state is RunState.CREATED
    return fork.trained()


def test_a_fork_without_changes_trains_like_the_original_run(tiny_model: Path, tmp_path: Path) -> None:
    held = {"eval_path": str(HELDOUT), "eval_steps": 4}
    parent = TinyRun(tiny_model, tmp_path / "parent", **OPTIONS, **held).trained()
    fork = forked(parent, 4, tmp_path / "fork")
    assert fork.losses() == parent.losses()  # the first 4 steps are copied
    assert fork.adapter_bytes() == parent.adapter_bytes()
    assert [event["step"] for event in fork.events("started")] == [0, 4]
    assert (fork.status.forked_from, fork.status.forked_at_step) == (parent.task_id, 4)
    assert fork.run_file()["forked_from"] == {"task_id": parent.task_id, "step": 4}
    assert fork.run_file()["metrics"] == parent.run_file()["metrics"]


def test_a_completed_run_is_continued_by_a_fork_with_more_steps(tiny_model: Path, tmp_path: Path) -> None:
    parent = TinyRun(tiny_model, tmp_path / "parent", **OPTIONS, lr_scheduler="constant").trained()
    fork = forked(parent, None, tmp_path / "fork", max_steps=16, learning_rate=5e-3)
    assert list(fork.losses()) == list(range(1, 17))
    rates = [event["learning_rate"] for event in fork.events("step")]
    assert rates[11:13] == [1e-2, 5e-3]


def test_a_fork_keeps_its_checkpoint_if_the_original_run_is_removed(tiny_model: Path, tmp_path: Path) -> None:
    parent = TinyRun(tiny_model, tmp_path / "parent", **OPTIONS).trained()
    losses = parent.losses()
    task_id = parent.manager.fork(parent.task_id, 8, {"output_dir": str(tmp_path / "fork")})
    shutil.rmtree(parent.path)
    Checkpoint.of(parent.manager.run_directory(task_id).path / "checkpoint-8").verify()
    parent.manager.start_training(task_id)
    parent.task_id, parent.output = task_id, tmp_path / "fork"
    assert parent.completed().losses() == losses


def test_a_fork_that_is_not_possible_is_refused_and_leaves_no_files(tiny_model: Path, tmp_path: Path) -> None:
    parent = TinyRun(tiny_model, tmp_path / "parent", **OPTIONS).trained()
    weights = parent.path / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused: list[tuple[int | None, dict[str, Any], type[SageError], str]] = [
        (5, {}, NotFound, "has no checkpoint of step 5"),
        (4, {}, RunError, "its checksum differs"),
        (8, {"seed": 7}, ConfigError, "cannot change seed"),
        (8, {"learning_rate": 7}, ConfigError, "learning_rate"),
        (12, {}, ConfigError, "A fork from step 12 has no step left to train"),
        (8, {"output_dir": str(parent.output)}, SageError, "contains the result of"),
    ]
    for step, options, error, message in refused:
        with pytest.raises(error, match=message):
            parent.manager.fork(parent.task_id, step, {"output_dir": str(tmp_path / "none"), **options})
    assert not (tmp_path / "none").exists()
    assert parent.manager.list() == [parent.task_id]
