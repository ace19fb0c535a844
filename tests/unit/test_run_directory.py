"""Run directories: events, checkpoints, claims of output folders, and figures."""

import contextlib
import errno
import json
import os
import resource
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sage.common.errors import ConfigError, NotFound, OutputError, RunError
from sage.common.shortages import is_shortage
from sage.common.training import (
    FIGURES,
    AnyRunEvent,
    FailedEvent,
    LaunchedEvent,
    StartedEvent,
    StepEvent,
    StoppedEvent,
    parse_event,
)  # fmt: skip
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.run import checkpoints
from sage.libs.finetune.run.checkpoints import Checkpoint, latest_good, list_checkpoints, prune, publish
from sage.libs.finetune.run.eta import ProgressMeter
from sage.libs.finetune.run.output import RUN_FILE, check_claim, claim_output, write_record
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec
from sage.libs.finetune.run.series import StepSeries
from sage.libs.finetune.run.status import RunState, RunStatus, derive, fold
from sage.libs.finetune.run.summary import read_status, read_summary, write_summary


def make_run(path: Path, **options: Any) -> RunDirectory:
    config = FinetuneConfig(**{"base_model": "m", "dataset_path": "/d.jsonl", "output_dir": "/o", **options})
    run = RunDirectory(path)
    run.create(RunSpec(path.name, config, "0" * 64, "2026-01-01T00:00:00+00:00"))
    return run


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Make every further `open` in the `with` block fail."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_check_of_an_output_folder_fails_if_its_owner_cannot_be_read(tmp_path: Path) -> None:
    claim_output(tmp_path, "task-a", tmp_path / "run")
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        check_claim(tmp_path, "task-b")


def test_a_spec_is_written_once_and_can_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    spec = run.read_spec()
    assert (spec.task_id, spec.config.lora_rank) == ("task-a", 8)
    run.create(RunSpec("task-b", spec.config, "1" * 64, ""))
    assert run.read_spec() == spec


def test_only_its_user_can_read_a_run_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "finetuned" / "task-a")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700


def parsed(events: Iterable[dict[str, object]]) -> list[AnyRunEvent]:
    return [event for fields in events if (event := parse_event(json.dumps(fields).encode()))]


def kinds(events: Iterable[tuple[AnyRunEvent, int]]) -> list[str]:
    return [event.event for event, _ in events]


def test_an_event_that_lacks_a_field_is_skipped() -> None:
    events = [{"event": "launched"}, STARTED, {"event": "checkpoint"}, {"event": "failed", "message": None}, STEP]
    status = fold(RunStatus(), parsed(events))
    assert (status.state, status.step, status.checkpoint_step) == (RunState.RUNNING, 4, None)


def test_an_incomplete_last_line_is_skipped_and_the_next_event_begins_a_new_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    run.append_event(LaunchedEvent())
    with run.events_path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    [(launched, offset)] = run.read_events()
    assert launched.event == "launched"
    run.append_event(StoppedEvent(step=1))
    assert kinds(run.read_events(offset)) == ["stopped"]


def test_events_are_read_from_an_offset(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    assert list(run.read_events()) == []
    run.append_event(LaunchedEvent())
    [(_, offset)] = run.read_events()
    run.append_event(FailedEvent(code="c", message="m"))
    [(failed, end)] = run.read_events(offset)
    assert failed.event == "failed"
    assert list(run.read_events(end)) == []


def test_a_status_starts_from_the_summary_unless_earlier_events_were_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    for event in (LaunchedEvent(), StartedEvent(step=0, total_steps=3), StepEvent(step=1, total_steps=3, loss=2.0)):
        run.append_event(event)
    write_summary(run)
    saved = read_summary(run)
    assert saved.offset == run.events_path.stat().st_size
    run.append_event(StepEvent(step=2, total_steps=3, loss=1.5))
    assert saved.status.step == 1
    status = read_status(run)
    assert (status.step, status.metrics.loss, status.state) == (2, 1.5, RunState.RUNNING)
    run.events_path.write_bytes(run.events_path.read_bytes().replace(b"2.0", b"9.0"))  # changed before the offset
    assert read_summary(run).offset == 0
    assert read_status(run) == status
    run.summary_path.write_text("{")
    assert read_status(run) == status


def test_a_series_of_steps_reads_only_new_events_and_keeps_first_last_and_extremes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a")
    series = StepSeries(run, kept_steps=50)
    losses = {step: 5.0 - step / 100 + (3.0 if step == 77 else 0.0) for step in range(1, 401)}
    for step, loss in losses.items():
        run.append_event(StepEvent(step=step, total_steps=400, loss=loss))
    steps = series.read()
    assert len(steps) <= 100
    assert (steps[0].step, steps[-1].step) == (1, 400)
    few = series.read(after=50, max_points=10)
    assert len(few) <= 10
    assert few[0].step > 50
    assert few[-1].step == 400
    assert max(step.loss or 0.0 for step in steps) == losses[77]
    run.append_event(StepEvent(step=400, total_steps=400, loss=0.5))  # a resumed run repeats a step
    assert [step.loss for step in series.read(after=399)] == [0.5]
    run.events_path.rename(tmp_path / "moved")
    assert len(series.read()) == len(steps)  # events that were read once are not read again


def test_concurrent_readers_read_each_event_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = FinetuneManager(tmp_path)
    run = make_run(tmp_path / "task-a")
    for step in range(1, 201):
        run.append_event(StepEvent(step=step, total_steps=200, loss=1.0))
    read: list[int] = []
    original = RunDirectory.read_events

    def counted(self: RunDirectory, offset: int = 0) -> Iterator[tuple[AnyRunEvent, int]]:
        for event, end in original(self, offset):
            read.append(end)
            yield event, end

    monkeypatch.setattr(RunDirectory, "read_events", counted)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(8) as pool:
            series = list(pool.map(lambda _: manager.training_steps("task-a", max_points=20), range(64)))
    finally:
        sys.setswitchinterval(interval)
    assert all((steps[0].step, steps[-1].step) == (1, 200) for steps in series)
    assert len(read) == len(set(read)) == 200


def test_every_figure_of_a_step_event_appears_in_the_progress() -> None:
    [event] = parsed([{**STEP, "grad_norm": 0.25, "memory_bytes": 7}])
    progress = fold(RunStatus(), [event]).training_progress()
    for figure in FIGURES:
        assert getattr(progress, figure.name) == getattr(event, figure.name), figure.name


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
    assert derive(fold(RunStatus(), parsed(events)), alive=alive).state is state


def test_the_hint_of_a_crashed_run_names_the_checkpoint_that_resume_uses() -> None:
    events = [{"event": "launched"}, STARTED, STEP, {"event": "checkpoint", "step": 3}]
    status = derive(fold(RunStatus(), parsed(events)), alive=False)
    assert status.code == "worker_died"
    assert "checkpoint 3" in (status.hint or "")
    assert status.progress == 0.4


def test_the_hint_names_the_older_checkpoint_from_which_the_run_continued() -> None:
    saved = [{"event": "checkpoint", "step": 3}, {"event": "checkpoint", "step": 6}]
    events = [STARTED, *saved, {"event": "launched"}, {**STARTED, "step": 3}, STEP]
    assert "checkpoint 3" in (derive(fold(RunStatus(), parsed(events)), alive=False).hint or "")


def test_held_out_losses_before_and_after_are_separate_and_a_repeated_warning_is_listed_once() -> None:
    warning = {"event": "warning", "message": "w"}
    events = [{"event": "eval", "step": 0, "loss": 3.0}, {"event": "eval", "step": 9, "loss": 1.0}, warning, warning]
    status = fold(RunStatus(), parsed(events))
    assert (status.heldout_loss_before, status.heldout_loss, status.warnings) == (3.0, 1.0, ("w",))


def test_a_warning_of_version_0_1_0_is_read_with_its_old_field() -> None:
    old = {"event": "warning", "message": "w", "halvings": 2, "checkpointing": True}
    status = fold(RunStatus(), parsed([old]))
    assert (status.halvings, status.activation_checkpointing) == (2, True)


def written(run: Path, step: int) -> Path:
    folder = run / "staging" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes([step]) * 100)
    return folder


def test_a_checkpoint_exists_only_if_it_is_complete(tmp_path: Path) -> None:
    folder = written(tmp_path, 5)
    assert list_checkpoints(tmp_path) == []
    publish(folder, tmp_path, 5)
    (tmp_path / "checkpoint-9").mkdir()  # a folder without a manifest is not a checkpoint
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]


def damage(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "weights").write_bytes(b"x")


def test_a_damaged_checkpoint_is_renamed_and_reported_once_and_an_older_one_is_used(tmp_path: Path) -> None:
    publish(written(tmp_path, 5), tmp_path, 5)
    newer = publish(written(tmp_path, 10), tmp_path, 10)
    damage(newer)
    with pytest.raises(RunError, match="its checksum differs"):
        newer.verify()
    found, problems = latest_good(tmp_path)
    assert found is not None
    assert found.step == 5
    assert "checkpoint-10" in problems[0]
    assert (tmp_path / "damaged-checkpoint-10").is_dir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]
    assert latest_good(tmp_path) == (found, [])


@pytest.mark.parametrize("harm", ["weights", "manifest.json", "{}", "[]", '{"files_sha256": 1}', "{"])
def test_a_checkpoint_without_a_file_or_with_a_broken_manifest_is_damaged(tmp_path: Path, harm: str) -> None:
    checkpoint = publish(written(tmp_path, 5), tmp_path, 5)
    if harm[0] in "{[":
        (checkpoint.path / "manifest.json").write_text(harm)
    else:
        (checkpoint.path / harm).unlink()
    with pytest.raises(RunError) as caught:
        checkpoint.verify()
    assert caught.value.code == "checkpoint_damaged"


def test_a_checkpoint_that_is_temporarily_unreadable_does_not_count_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(written(tmp_path, 5), tmp_path, 5)

    def no_descriptors(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", no_descriptors)
        with pytest.raises(OSError, match="Too many open files"):
            latest_good(tmp_path)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]


@pytest.mark.parametrize("keep", [1, 2])
def test_pruning_never_removes_the_last_intact_checkpoint(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3):
        publish(written(tmp_path, step), tmp_path, step)
    for step in (8, 9):
        damage(publish(written(tmp_path, step), tmp_path, step))
    problems = prune(tmp_path, keep)
    assert len(problems) == 2
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 3][-keep:]


def test_a_second_checkpoint_of_a_step_replaces_the_first_only_if_the_first_is_damaged(tmp_path: Path) -> None:
    first = publish(written(tmp_path, 5), tmp_path, 5)
    inode = first.path.stat().st_ino
    assert publish(written(tmp_path, 5), tmp_path, 5).path.stat().st_ino == inode
    damage(first)
    publish(written(tmp_path, 5), tmp_path, 5).verify()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        publish(written(tmp_path, step), tmp_path, step)
    prune(tmp_path, 2)
    assert [c.step for c in list_checkpoints(tmp_path)] == [9, 10]


def test_older_checkpoints_remain_if_a_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(written(tmp_path, 5), tmp_path, 5)
    newer = written(tmp_path, 10)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "fsync_tree", full)
    with pytest.raises(OSError, match="No space"):
        publish(newer, tmp_path, 10)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]


def saved_by(run: RunDirectory, step: int, total_steps: int) -> Checkpoint:
    folder = written(run.path, step)
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": total_steps, "global_step": step}))
    return publish(folder, run.path, step)


def continue_from(checkpoint: Checkpoint, data: str = "0" * 64, **options: Any) -> None:
    values = {"base_model": "m", "dataset_path": "/d.jsonl", "output_dir": "/other", "num_epochs": 2, **options}
    checkpoint.check_can_continue(FinetuneConfig(**values), data, lambda name: Path("/models", name.lower()))


def test_only_a_run_with_the_same_options_and_data_continues_from_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a", num_epochs=2, save_steps=2)
    checkpoint = saved_by(run, 4, 10)
    continue_from(checkpoint)
    continue_from(checkpoint, base_model="M", dataset_path="/copy.jsonl", keep_checkpoints=9)
    continue_from(checkpoint, max_steps=10)
    for options, named in (
        ({"data": "1" * 64}, "dataset_path"),
        ({"dataset_path": "/d.jsonl=2"}, "dataset_path"),
        ({"base_model": "other"}, "base_model"),
        ({"num_epochs": 3}, "num_epochs"),
        ({"max_steps": 4}, "max_steps"),
        ({"max_steps": 20}, "max_steps"),
        ({"seed": 1, "learning_rate": 1e-5}, "learning_rate, seed"),
        ({"eval_split": 0.1}, "eval_split"),
    ):
        with pytest.raises(ConfigError, match=named) as caught:
            continue_from(checkpoint, **options)  # type: ignore[arg-type]
        assert caught.value.code == "checkpoint_mismatch"
        assert "output folder of the checkpoint's run" in caught.value.hint


def test_a_checkpoint_of_the_last_step_is_rejected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "task-a", num_epochs=2)
    with pytest.raises(ConfigError, match="at step 10 of 10: no step is left"):
        continue_from(saved_by(run, 10, 10))


def test_a_folder_that_no_run_wrote_is_rejected_as_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(NotFound, match="is not a checkpoint of a run"):
        Checkpoint.of(tmp_path / "checkpoint-5")
    alone = publish(written(tmp_path, 7), tmp_path, 7)
    with pytest.raises(ConfigError, match="of the run that saved"):
        continue_from(Checkpoint.of(alone.path))


def claim(output: Path, task: str, run: Path) -> str | None:
    try:
        claim_output(output, task, run)
    except OutputError as error:
        return error.message
    return None


def test_if_several_runs_claim_a_folder_at_once_only_one_succeeds(tmp_path: Path) -> None:
    tasks = [f"task-{number}" for number in range(16)]
    runs = {task: make_run(tmp_path / "runs" / task).path for task in tasks}
    with ThreadPoolExecutor(16) as pool:
        refusals = list(pool.map(lambda task: claim(tmp_path / "out", task, runs[task]), tasks))
    assert sum(refusal is None for refusal in refusals) == 1
    owner = json.loads((tmp_path / "out" / RUN_FILE).read_text())["task_id"]
    assert refusals[tasks.index(owner)] is None
    assert stat.S_IMODE((tmp_path / "out" / RUN_FILE).stat().st_mode) == 0o600


def test_a_queued_run_owns_its_output_folder_under_every_path(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "task-a")
    claim_output(tmp_path / "out", "task-a", run.path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for path in ("out", "link", "runs/../out"):
        assert "is claimed by a run that has not started yet: task-a" in (claim(tmp_path / path, "task-b", tmp_path) or "")
        with pytest.raises(OutputError):
            check_claim(tmp_path / path, "task-b")
    run.append_event(LaunchedEvent())
    run.append_event(FailedEvent(code="c", message="m"))
    assert claim(tmp_path / "link", "task-b", tmp_path) is None
    with pytest.raises(OutputError, match="now belongs to task-b"):
        write_record(tmp_path / "out", {"task_id": "task-a"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RUN_FILE]


def test_an_output_folder_is_claimed_and_claimed_again_by_the_same_run(tmp_path: Path) -> None:
    for _ in range(2):
        claim_output(tmp_path / "out", "task-a", tmp_path / "run")
    claim_output(tmp_path / "out", "task-b", tmp_path / "run")  # task-a wrote no result and is not running
    assert json.loads((tmp_path / "out" / RUN_FILE).read_text())["task_id"] == "task-b"


def test_other_files_and_the_result_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"is not empty: it contains thesis\.tex"):
        claim_output(tmp_path / "out", "task-a", tmp_path)
    claim_output(tmp_path / "done", "task-a", tmp_path)
    (tmp_path / "done" / "adapter_config.json").touch()
    with pytest.raises(OutputError, match="contains the result of the run task-a"):
        claim_output(tmp_path / "done", "task-b", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        claim_output(tmp_path / "file", "task-b", tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        claim_output(Path("/proc/out"), "task-b", tmp_path)


def test_without_file_descriptors_no_other_folder_is_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OutputError, match="cannot be written: Too many open files") as caught:
        claim_output(tmp_path / "out", "task-a", tmp_path / "run")
    assert caught.value.code == "output_unavailable"
    assert "ulimit -n" in caught.value.hint
    assert is_shortage(caught.value)


def test_the_eta_is_unknown_for_ten_steps_and_then_follows_the_speed() -> None:
    meter = ProgressMeter(remaining_steps=100, closing_seconds=7)
    meter.add(tokens=50, seconds=60)  # the first step is a warm-up and does not count
    for _ in range(8):
        meter.add(tokens=50, seconds=2)
    assert meter.eta_seconds is None
    meter.add(tokens=50, seconds=2)
    assert meter.eta_seconds == pytest.approx(90 * 2 + 7)
    for _ in range(20):
        meter.add(tokens=50, seconds=2)
    assert meter.tokens_per_second == pytest.approx(25)
