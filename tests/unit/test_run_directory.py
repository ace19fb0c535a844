import json
from pathlib import Path

import pytest

from sage.common.errors import OutputError, RunError
from sage.libs.finetune.checkpoints import latest_good, list_checkpoints, prune, publish
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.eta import ProgressMeter
from sage.libs.finetune.output import RUN_FILE, claim_output
from sage.libs.finetune.rundir import RunDirectory, RunSpec
from sage.libs.finetune.status import RunState, RunStatus, derive, fold


def make_run(path: Path) -> RunDirectory:
    config = FinetuneConfig(base_model="m", dataset_path="/d.jsonl", output_dir="/o")
    run = RunDirectory(path)
    run.create(RunSpec(path.name, config, "0" * 64, "2026-01-01T00:00:00+00:00"))
    return run


def test_a_spec_is_written_once_and_read_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    spec = run.read_spec()
    assert (spec.task_id, spec.config.lora_rank) == ("task-a", 8)
    run.create(RunSpec("task-b", spec.config, "1" * 64, ""))
    assert run.read_spec() == spec


def test_a_torn_last_line_is_passed_over_and_the_next_event_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    run.append_event("launched")
    with run.events_path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    events, offset = run.read_events()
    assert [event["event"] for event in events] == ["launched"]
    run.append_event("stopped", step=1)
    events, _ = run.read_events(offset)
    assert [event["event"] for event in events] == ["stopped"]


def test_events_are_read_from_where_the_reader_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    assert run.read_events() == ([], 0)
    run.append_event("launched")
    _, offset = run.read_events()
    run.append_event("failed", code="c", message="m")
    events, end = run.read_events(offset)
    assert [event["event"] for event in events] == ["failed"]
    assert run.read_events(end) == ([], end)


STARTED = {"event": "started", "step": 0, "total_steps": 10}
STEP = {"event": "step", "step": 4, "total_steps": 10, "loss": 1.5, "eta_seconds": 6.0, "epoch": 0.4}


@pytest.mark.parametrize(
    ("events", "alive", "state"),
    [
        ([], False, RunState.CREATED),
        ([{"event": "launched"}], True, RunState.STARTING),
        ([{"event": "launched"}], False, RunState.FAILED),
        ([{"event": "launched"}, STARTED], True, RunState.RUNNING),
        ([{"event": "launched"}, STARTED, STEP], False, RunState.FAILED),
        ([{"event": "launched"}, STARTED, {"event": "stopped", "step": 4}], True, RunState.STOPPED),
        ([{"event": "launched"}, STARTED, {"event": "stopped", "step": 4}, {"event": "launched"}], True, RunState.STARTING),
        ([STARTED, {"event": "finished", "step": 10}], False, RunState.COMPLETED),
        ([STARTED, {"event": "failed", "code": "c", "message": "m"}], False, RunState.FAILED),
        ([{"event": "something new"}], False, RunState.CREATED),
    ],
)
def test_the_state_follows_from_events_and_lock(events: list[dict[str, object]], alive: bool, state: RunState) -> None:
    assert derive(fold(RunStatus(), events), alive=alive).state is state


def test_a_dead_run_says_where_it_goes_on() -> None:
    events = [{"event": "launched"}, STARTED, STEP, {"event": "checkpoint", "step": 3}]
    status = derive(fold(RunStatus(), events), alive=False)
    assert status.code == "worker_died"
    assert "checkpoint 3" in (status.hint or "")
    assert status.progress == 0.4


def test_held_out_losses_before_and_after_are_told_apart_and_warnings_once() -> None:
    warning = {"event": "warning", "message": "w"}
    events = [{"event": "eval", "step": 0, "loss": 3.0}, {"event": "eval", "step": 9, "loss": 1.0}, warning, warning]
    status = fold(RunStatus(), events)
    assert (status.heldout_loss_before, status.heldout_loss, status.warnings) == (3.0, 1.0, ("w",))


def written(run: Path, step: int) -> Path:
    folder = run / "staging" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes([step]) * 100)
    return folder


def test_a_checkpoint_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = written(tmp_path, 5)
    assert list_checkpoints(tmp_path) == []
    publish(folder, tmp_path, 5)
    (tmp_path / "checkpoint-9").mkdir()  # without a manifest: someone's own folder
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path) -> None:
    publish(written(tmp_path, 5), tmp_path, 5)
    newer = publish(written(tmp_path, 10), tmp_path, 10)
    (newer.path / "weights").write_bytes(b"x")
    with pytest.raises(RunError, match="differs from what was saved"):
        newer.verify()
    found, problems = latest_good(tmp_path)
    assert found is not None
    assert found.step == 5
    assert "checkpoint-10" in problems[0]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        publish(written(tmp_path, step), tmp_path, step)
    prune(tmp_path, 2)
    assert [c.step for c in list_checkpoints(tmp_path)] == [9, 10]


def test_an_output_folder_is_claimed_and_claimed_again_by_the_same_run(tmp_path: Path) -> None:
    for _ in range(2):
        claim_output(tmp_path / "out", "task-a", tmp_path / "run")
    claim_output(tmp_path / "out", "task-b", tmp_path / "run")  # task-a left nothing and does not live
    assert json.loads((tmp_path / "out" / RUN_FILE).read_text())["task_id"] == "task-b"


def test_someone_else_s_files_and_another_run_s_result_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"is not empty: it holds thesis\.tex"):
        claim_output(tmp_path / "out", "task-a", tmp_path)
    claim_output(tmp_path / "done", "task-a", tmp_path)
    (tmp_path / "done" / "adapter_config.json").touch()
    with pytest.raises(OutputError, match="holds the result of task-a"):
        claim_output(tmp_path / "done", "task-b", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        claim_output(tmp_path / "file", "task-b", tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        claim_output(Path("/proc/out"), "task-b", tmp_path)


def test_the_eta_is_estimated_for_ten_steps_and_then_follows_the_pace() -> None:
    meter = ProgressMeter(remaining_steps=100, closing_seconds=7)
    meter.add(tokens=50, seconds=60)  # the first one warms up
    for _ in range(8):
        meter.add(tokens=50, seconds=2)
    assert meter.eta_seconds is None
    meter.add(tokens=50, seconds=2)
    assert meter.eta_seconds == pytest.approx(90 * 2 + 7)
    for _ in range(20):
        meter.add(tokens=50, seconds=2)
    assert meter.tokens_per_second == pytest.approx(25)
