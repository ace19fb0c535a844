"""A backup of a SAGE_HOME while a run trains, and the restoration after the SAGE_HOME is lost."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support import SAMPLES, engine_of, list_engines, sage, wait_for
from training import TinyRun

from sage.common.processes import holder
from sage.libs.finetune.manager import FinetuneManager


def training(engine: str) -> dict[str, Any]:
    return dict(list_engines()[engine]["training"] or {})


def test_a_run_that_trained_during_the_backup_continues_in_the_restored_home(
    tiny_model: Path, sage_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 60
    engine = engine_of(sage(
        "llm", "engine", "start", str(tiny_model), "--engine-kind", "finetune", "--dataset", str(SAMPLES), "--output",
        str(tmp_path / "out"), "--max-steps", str(steps), "--save-steps", "5", "--restart-policy", "unless-stopped",
        "--precision", "fp32", "--batch-size", "4", "--learning-rate", "1e-2",
    ))  # fmt: skip
    task = engine.replace("engine-", "task-")
    run = sage_home / "data/models/finetuned" / task
    wait_for(lambda: list(run.glob("checkpoint-*/manifest.json")), "a checkpoint")
    backup = tmp_path / "sage.tar.gz"
    sage("backup", str(backup))
    worker = holder(run / "worker.lock")
    assert worker, "the run ended before the backup was complete"
    sage("gateway", "stop")
    worker.send_signal(signal.SIGKILL)
    wait_for(lambda: holder(run / "worker.lock") is None, "the end of the worker")
    shutil.rmtree(sage_home)
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "new-home"))
    sage("restore", str(backup))
    sage("gateway", "start")
    wait_for(lambda: list_engines()[engine]["state"] == "completed", "the end of the run")
    sage("gateway", "stop")
    events = [event for event, _ in FinetuneManager().events(task)]
    starts = [event.step for event in events if event.event == "started"]
    assert starts[0] == 0
    assert starts[-1] >= 5
    whole = TinyRun(tiny_model, tmp_path / "whole", max_steps=steps, save_steps=5).trained()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole.adapter_bytes()
    assert not os.path.lexists(sage_home)
