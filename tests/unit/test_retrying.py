"""How a run that is out of memory continues with smaller micro-batches."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.retrying import (
    micro_batch_size,
    next_saving,
    restart_with_less_memory,
    restarts_when_out_of_memory,
)
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec
from sage.libs.finetune.run.status import RunStatus, fold


def config(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(base_model="m", dataset_path="/d", output_dir="/o", **options)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"batch_size": 8}, [8, 4, 2, 1, 1]),
        ({"batch_size": 6}, [6, 3, 1, 1]),
        ({"batch_size": 5}, [5, 1, 1]),
        ({"batch_size": 8, "method": "kto"}, [8, 4, 2, 2]),
        ({"batch_size": 8, "pack_tokens": 512}, [1, 1]),
    ],
)
def test_a_micro_batch_is_halved_and_divides_the_batch(options: dict[str, Any], sizes: list[int]) -> None:
    assert [micro_batch_size(config(**options), halvings) for halvings in range(len(sizes))] == sizes


def test_after_the_smallest_micro_batch_gradient_checkpointing_is_the_last_attempt() -> None:
    status, messages = RunStatus(), []
    given = config(batch_size=4, gradient_accumulation_steps=3, method="dpo")
    while saving := next_saving(given, status):
        status = fold(status, [saving])
        messages.append(saving.message)
    assert messages == [
        "Out of memory: the micro-batch size is now 2 instead of 4, and a step has 6 micro-batches.",
        "Out of memory: the micro-batch size is now 1 instead of 2, and a step has 12 micro-batches.",
        "Out of memory: enabling gradient checkpointing, which is slower.",
    ]


def test_only_runs_with_trl_s_methods_or_several_processes_restart_the_worker() -> None:
    assert not restarts_when_out_of_memory(config())
    assert restarts_when_out_of_memory(config(num_processes=2))
    assert restarts_when_out_of_memory(config(method="dpo"))


def test_a_worker_whose_stop_was_requested_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM at any moment either prevents the replacement, or waits until the new worker handles the signal."""
    replace = Mock()
    monkeypatch.setattr(os, "execv", replace)
    run = RunDirectory(tmp_path)
    run.create(RunSpec("task-a", config(method="dpo", batch_size=4), "0" * 64, "2026-01-01T00:00:00+00:00"))
    try:
        restart_with_less_memory(run, lambda: True)
        assert not replace.called
        assert list(run.read_events()) == []
        restart_with_less_memory(run, lambda: False)
        assert replace.called
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
