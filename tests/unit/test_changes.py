"""Requests to change the options of a run: which requests are refused, and which values apply at a step."""

from pathlib import Path
from typing import Any

import pytest

from sage.common.errors import ConfigError, Conflict
from sage.common.training import ChangedEvent, StepEvent, TrainingOptions
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.changes import (
    RequestReader,
    check_change,
    configured_options,
    options_at,
    read_request,
    request_change,
)
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunState, RunStatus, fold

CONFIGURED = TrainingOptions(learning_rate=0.1, max_steps=20, early_stopping_patience=0)


def config(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(base_model="m", dataset_path="/d", output_dir="/o", **options)


def change(revision: int, step: int, **new: Any) -> ChangedEvent:
    return ChangedEvent(revision=revision, step=step, old=TrainingOptions(), new=TrainingOptions(**new), message="m")


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ([], 5, (0.1, 20)),
        ([change(1, 8, learning_rate=0.5)], 7, (0.1, 20)),
        ([change(1, 8, learning_rate=0.5)], 8, (0.5, 20)),
        ([change(1, 8, learning_rate=0.5), change(2, 9, max_steps=30)], 9, (0.5, 30)),
        # The second request was made after the run had resumed from step 5.
        ([change(1, 8, learning_rate=0.5), change(2, 6, learning_rate=0.2)], 7, (0.2, 20)),
        ([change(1, 8, learning_rate=0.5), change(2, 6, learning_rate=0.2)], 9, (0.2, 20)),
    ],
)
def test_the_newest_request_that_has_taken_effect_applies(
    changes: list[ChangedEvent], step: int, expected: tuple[float, int]
) -> None:
    options = options_at(CONFIGURED, changes, step)
    assert (options.learning_rate, options.max_steps) == expected


def test_a_request_includes_the_options_of_an_earlier_request_that_is_not_applied_yet(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert request_change(run, TrainingOptions(learning_rate=0.5)) == 1
    assert request_change(run, TrainingOptions(max_steps=30)) == 2
    pending = read_request(run)
    assert pending
    assert pending.options == TrainingOptions(learning_rate=0.5, max_steps=30)
    run.append_event(change(2, 3, learning_rate=0.5, max_steps=30))
    assert request_change(run, TrainingOptions(max_steps=40)) == 3
    pending = read_request(run)
    assert pending
    assert pending.options == TrainingOptions(max_steps=40)


def test_the_worker_reads_each_request_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    reader = RequestReader(run)
    assert reader.read() is None
    for revision in (1, 2):
        request_change(run, TrainingOptions(max_steps=30 + revision))
        request = reader.read()
        assert request
        assert request.revision == revision
        assert reader.read() is None


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "The request contains no option to change."),
        ({"max_steps": 9}, {}, "has already completed step 9"),
        ({"max_steps": 30}, {"streaming": True, "max_steps": 20}, "run with streaming cannot be changed"),
        ({"early_stopping_patience": 2}, {}, "needs eval_steps"),
    ],
)
def test_a_change_that_is_not_possible_is_refused_with_the_reason(
    given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_change("task-a", config(**options), RunStatus(RunState.RUNNING, step=9), TrainingOptions(**given))


def test_a_completed_run_cannot_be_changed() -> None:
    with pytest.raises(Conflict, match="task-a is completed"):
        check_change("task-a", config(), RunStatus(RunState.COMPLETED), TrainingOptions(learning_rate=0.1))


def test_the_status_shows_the_change_and_the_new_number_of_steps() -> None:
    status = fold(RunStatus(), [StepEvent(step=3, total_steps=20), change(1, 4, max_steps=30)])
    assert (status.total_steps, status.change_revision, status.changes) == (30, 1, ("m",))


def test_without_a_change_the_options_of_the_configuration_apply() -> None:
    found = configured_options(config(learning_rate=0.1, num_epochs=2))
    assert found == TrainingOptions(learning_rate=0.1, max_steps=None, early_stopping_patience=0)
