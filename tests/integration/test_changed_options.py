"""Options that users change while a run trains."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support import HELDOUT, wait_for
from training import TinyRun

from sage.common.training import ChangedEvent, TrainingOptions
from sage.libs.finetune import FinetuneManager
from sage.libs.finetune.run.changes import request_change
from sage.libs.finetune.run.status import RunState
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun

ALL_STEPS: dict[str, Any] = {"save_steps": 5, "keep_checkpoints": 99}


class ChangeRequested(StopRequest):
    """Requests a change of options after a step. The run reads `requested` after each step."""

    def __init__(self, run: TinyRun, step: int, **options: Any) -> None:
        self.run, self.step = run, step
        self.options: TrainingOptions | None = TrainingOptions(**options)

    @property
    def requested(self) -> bool:
        """Return False, because no stop is requested. Request the change if its step has come."""
        if self.options and self.run.status.step == self.step - 1:
            self.run.manager.change_options(self.run.task_id, self.options)
            self.options = None
        return False


def changed_after(step: int, run: TinyRun, **options: Any) -> TinyRun:
    """Train a run in this process, and change options after a step."""
    TrainingRun(run.manager.run_directory(run.task_id), ChangeRequested(run, step, **options)).train()
    return run.completed()


def with_changes_of(run: TinyRun, other: TinyRun) -> TinyRun:
    """Copy the recorded changes of a run into another run that has not started."""
    for event in run.events("changed"):
        other.manager.run_directory(other.task_id).append_event(ChangedEvent.model_validate(event))
    return other


def killed_at_checkpoint(run: TinyRun, step: int) -> TinyRun:
    """Make a completed run look as if it was killed after the checkpoint of a step was saved."""
    path = run.path / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if '"finished"' not in line))
    for checkpoint in run.path.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return run


@pytest.mark.parametrize("more", [{}, {"loraplus_lr_ratio": 16.0, "lr_scheduler": "linear"}])
def test_a_resumed_run_repeats_a_change_exactly(tiny_model: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    whole = changed_after(7, TinyRun(tiny_model, tmp_path / "whole", **ALL_STEPS, **more), learning_rate=3e-3, max_steps=16)
    (event,) = whole.events("changed")
    assert event["step"] == 8
    assert event["old"] == {"learning_rate": 1e-2, "max_steps": 12, "early_stopping_patience": None}
    assert event["new"] == {"learning_rate": 3e-3, "max_steps": 16, "early_stopping_patience": None}
    losses, adapter = whole.losses(), whole.adapter_bytes()
    assert len(losses) == whole.status.total_steps == 16
    for step in (10, 5):  # a checkpoint after the change, and a checkpoint before the change
        again = killed_at_checkpoint(whole, step)
        again.manager = FinetuneManager()  # without the cached status
        TrainingRun(again.manager.run_directory(again.task_id), StopRequest()).train()
        assert again.losses() == losses
        assert again.adapter_bytes() == adapter


def test_a_change_applies_from_the_next_step_on(tiny_model: Path, tmp_path: Path) -> None:
    plain = TinyRun(tiny_model, tmp_path / "plain", **ALL_STEPS).trained()
    run = changed_after(7, TinyRun(tiny_model, tmp_path / "out", **ALL_STEPS), learning_rate=3e-3)
    before, after = ([event["learning_rate"] for event in each.events("step")] for each in (plain, run))
    assert after[:7] == before[:7]
    assert after[7:] == pytest.approx([rate * 0.3 for rate in before[7:]])
    assert [plain.losses()[step] == run.losses()[step] for step in (8, 9)] == [True, False]


def test_a_run_longer_than_its_epochs_continues_with_the_next_epoch(tiny_model: Path, tmp_path: Path) -> None:
    options = {"max_steps": None, "num_epochs": 1, "batch_size": 16, "lr_scheduler": "constant"}
    run = changed_after(3, TinyRun(tiny_model, tmp_path / "out", **options), max_steps=14)
    whole = TinyRun(tiny_model, tmp_path / "whole", **{**options, "max_steps": 14}).trained()
    assert whole.status.metrics.epoch
    assert whole.status.metrics.epoch > 2
    assert run.losses() == whole.losses()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_fewer_steps_and_less_patience_end_a_run_early(tiny_model: Path, tmp_path: Path) -> None:
    short = changed_after(5, TinyRun(tiny_model, tmp_path / "short"), max_steps=7)
    assert short.status.step == 7
    held = {"eval_path": str(HELDOUT), "eval_steps": 2}
    run = TinyRun(tiny_model, tmp_path / "out", **held)
    impatient = changed_after(5, run, early_stopping_patience=1, learning_rate=1e-30)  # the loss no longer changes
    assert impatient.status.step == 8


def test_a_change_of_a_stopped_run_applies_when_it_is_resumed(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=4, save_steps=2)
    request_change(run.manager.run_directory(run.task_id), TrainingOptions(learning_rate=1e-3))
    run.trained()
    (event,) = run.events("changed")
    assert event["step"] == 1
    assert event["message"] == "From step 1 on: learning_rate 0.01 -> 0.001."


@pytest.mark.long
@pytest.mark.parametrize(
    ("max_steps", "more"), [(100, {}), (40, {"num_processes": 2, "batch_size": 2})], ids=["one process", "two processes"]
)
def test_a_changed_run_that_is_killed_and_resumed_has_the_result_of_an_uninterrupted_run(
    tiny_model: Path, tmp_path: Path, max_steps: int, more: dict[str, Any]
) -> None:
    options = {"save_steps": 20, "max_steps": 400, **more}
    run = TinyRun(tiny_model, tmp_path / "out", **options).start().at_step(6)
    run.manager.change_options(run.task_id, TrainingOptions(learning_rate=5e-3, max_steps=max_steps))
    wait_for(lambda: run.events("changed"), "the change")
    process = run.at_step(run.events("changed")[0]["step"] + 1).manager.process(run.task_id)
    assert process
    os.kill(process.pid, signal.SIGKILL)
    assert run.until_ended().state is RunState.FAILED
    whole = with_changes_of(run, TinyRun(tiny_model, tmp_path / "whole", **options)).start().completed()
    assert run.resumed().losses() == whole.losses()
    assert run.adapter_bytes() == whole.adapter_bytes()
    assert len(whole.losses()) == max_steps
