"""Several processes that train one model together. In these tests they share one CPU instead of using several GPUs."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import HELDOUT, wait_for
from training import TinyRun

from sage.libs.finetune.run.status import RunState

OPTIONS: dict[str, Any] = {"max_steps": 8, "save_steps": 100, "lora_dropout": 0.0}


def others(run: TinyRun) -> list[psutil.Process]:
    leader = run.manager.process(run.task_id)
    return psutil.Process(leader.pid).children() if leader else []


def test_two_processes_have_the_losses_of_one_process_with_batches_twice_as_large(tiny_model: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "gradient_accumulation_steps": 2, "eval_path": str(HELDOUT), "eval_steps": 4}
    one = TinyRun(tiny_model, tmp_path / "one", **options, batch_size=4).trained()
    two = TinyRun(tiny_model, tmp_path / "two", **options, batch_size=2, num_processes=2).start().completed()
    assert two.losses() == pytest.approx(one.losses(), rel=1e-3)
    assert two.status.heldout_loss == pytest.approx(one.status.heldout_loss, rel=1e-3)
    accuracies = [[event["token_accuracy"] for event in run.events("step")] for run in (one, two)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)
    assert two.status.total_steps == one.status.total_steps
    assert len(two.events("finished")) == len(two.events("started")) == 1


@pytest.mark.long
def test_a_stopped_run_of_two_processes_continues_with_the_same_losses(tiny_model: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "pack_tokens": 300, "num_processes": 2}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).start().completed()
    cut = TinyRun(tiny_model, tmp_path / "cut", **options).stopped_at(3)
    assert cut.resumed().losses() == whole.losses()
    assert cut.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize("victim", ["leader", pytest.param("follower", marks=pytest.mark.long)])
def test_if_one_process_is_killed_the_others_end(tiny_model: Path, tmp_path: Path, victim: str) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", **{**OPTIONS, "max_steps": 500}, num_processes=2).start().at_step(2)
    (follower,) = others(run)
    leader = run.manager.process(run.task_id)
    assert leader
    os.kill(follower.pid if victim == "follower" else leader.pid, signal.SIGKILL)
    status = run.until_ended()
    assert status.state is RunState.FAILED
    assert status.code == "worker_died"
    wait_for(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, "the follower to leave")


#: Makes the second process of a run fail in its third step with a MemoryError, but only once.
SHORT_OF_MEMORY = """
import os, sys, time
from pathlib import Path
mark, calls, clock = Path(__file__).with_name("failed"), [], time.monotonic
def failing_clock():
    if sys._getframe(1).f_code.co_filename.endswith("training/callbacks.py"):
        calls.append(1)
        if len(calls) == 4:
            mark.touch()
            raise MemoryError("out of memory")
    return clock()
if os.environ.get("SAGE_WORKER_RANK") and not mark.exists():
    time.monotonic = failing_clock
"""


@pytest.mark.long
def test_a_process_without_enough_memory_halves_the_micro_batch_of_all_processes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "max_steps": 5, "save_steps": 2, "batch_size": 4, "num_processes": 2}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).start().completed()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = TinyRun(tiny_model, tmp_path / "out", **options).start().completed()
    assert (tmp_path / "site" / "failed").exists()
    assert run.status.halvings == 1
    assert [event["step"] for event in run.events("started")] == [0, 2]
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-3)
