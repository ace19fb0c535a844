"""Experiment trackers."""

import importlib.util
from pathlib import Path

import pytest
from training import TinyRun

from sage.common.errors import ConfigError
from sage.libs.finetune.run.trackers import check_trackers

if_tensorboard = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))), reason="TensorBoard is not installed"
)


def test_the_error_for_a_missing_tracker_has_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="report_to wandb needs the package wandb, which is not installed") as caught:
        TinyRun(tiny_model, tmp_path / "out", report_to=["wandb"])
    assert (caught.value.hint, caught.value.param) == ("Install it: `pip install wandb`.", "report_to")
    assert not (tmp_path / "out").exists()
    check_trackers([])


@if_tensorboard
def test_tensorboard_receives_each_step_and_the_heldout_loss(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(
        tiny_model, tmp_path / "out", max_steps=2, report_to=["tensorboard"], eval_split=0.1, eval_steps=1
    ).trained()
    content = b"".join(path.read_bytes() for path in (run.path / "tensorboard").iterdir())
    assert content.count(b"train/loss") == 2
    assert content.count(b"eval/loss") == 2


@if_tensorboard
def test_a_tracker_that_fails_does_not_end_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))  # not a folder
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=2, report_to=["tensorboard"]).trained()
    assert any("tensorboard failed and receives no further steps" in warning for warning in run.status.warnings)
