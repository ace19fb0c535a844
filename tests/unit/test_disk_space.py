"""The disk space that a run needs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sage.common.errors import Conflict, RunError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.disk import CheckpointSpace, check_start


def config(output: Path, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(base_model="m", dataset_path="d.jsonl", output_dir=str(output), **options)


def with_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**15, 0, free_bytes))


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 3 * 3 + 1),  # the two newest checkpoints and the next one, each with AdamW's moments, and the result
        ({"keep_checkpoints": 5}, 6 * 3 + 1),
        ({"max_steps": 50, "save_steps": 50}, 1 * 3 + 1),
        ({"keep_best": True, "eval_path": "e.jsonl", "eval_steps": 10}, 4 * 3 + 1),
    ],
)
def test_a_run_starts_only_if_its_checkpoints_and_its_result_fit(
    options: dict[str, Any], copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = config(tmp_path / "out", **options)
    with_free(monkeypatch, copies * 10**6)
    check_start(checked, 10**6, tmp_path / "runs")
    with_free(monkeypatch, copies * 10**6 - 1)
    with pytest.raises(Conflict, match=rf"need {copies}\.0 MB on the disk of .*, but only .* are free"):
        check_start(checked, 10**6, tmp_path / "runs")


def test_a_checkpoint_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = CheckpointSpace(tmp_path, trained_bytes=1_000_000)
    with_free(monkeypatch, 3_000_000)
    space.check()
    (tmp_path / "optimizer.pt").write_bytes(bytes(3_000_001))
    space.written(tmp_path)
    with pytest.raises(RunError, match=r"is full: a checkpoint needs 3\.0 MB, and 3\.0 MB are free"):
        space.check()
