"""What is refused before anything is started, and what is told of engines."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import record
from pydantic import ValidationError

from sage.common.errors import ConfigError
from sage.libs.finetune.run.rundir import RunDirectory
from sage.llm.client.types import EngineKind, EngineState, StartRequest
from sage.llm.control_plane import inventory
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.exit_message import exit_message
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.metrics import engine_metrics


@pytest.mark.parametrize("model", ["./out", "../out", "~/out", "~nosuchuser/x", "a\\b", ".", ".."])
def test_a_folder_that_is_not_named_by_its_absolute_path_is_refused(model: str) -> None:
    with pytest.raises(ValidationError, match="absolute path"):
        StartRequest(model=model)


@pytest.mark.parametrize("model", ["", "x" * 513, "a\nb", "a\0b", "a\ud83d"])
def test_a_name_that_can_be_no_model_s_is_refused(model: str) -> None:
    with pytest.raises(ValidationError):
        StartRequest(model=model)


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B-Instruct", "/home/me/my models/out", "smollm2", "x" * 512])
def test_names_of_models_are_taken_as_they_are(model: str) -> None:
    assert StartRequest(model=model).model == model


@pytest.mark.parametrize(
    "options",
    [
        {"dataset_path": "data.jsonl", "output_dir": "/out"},
        {"dataset_path": ["/a.jsonl", "b.jsonl=0.5"], "output_dir": "/out"},
        {"dataset_path": "/a.jsonl", "output_dir": "out"},
        {"dataset_path": "/a.jsonl", "output_dir": "/out", "eval_path": "~/e.jsonl"},
        {"dataset_path": "/a.jsonl", "output_dir": "/out", "resume_from_checkpoint": "./c"},
        {"dataset_path": "/a.jsonl", "output_dir": "/out", "reward_file": "../r.py"},
    ],
)
def test_files_are_named_by_absolute_paths_since_the_gateway_works_elsewhere(options: dict[str, Any]) -> None:
    request = StartRequest(model="m", engine_kind=EngineKind.FINETUNE, options=options)
    with pytest.raises(ConfigError, match="is not an absolute path") as caught:
        asyncio.run(FinetuneExecutor(LocalLauncher()).prepare("engine-a", request))
    assert caught.value.param in options


@pytest.mark.parametrize(
    ("code", "log", "told"),
    [
        (1, "Traceback:\nModelError: no weights.\n", "It exited with code 1: ModelError: no weights."),
        (1, "Loading weights: 100%|####| 9/9 [00:01<00:00]\n", "It exited with code 1."),
        (1, "Loading weights:  10%\rLoading weights: 100%", "It exited with code 1."),
        (1, "12it/s\n", "It exited with code 1."),
        (1, "2026-11-25T10:00:00+0000 INFO    sage: loaded\n", "It exited with code 1."),
        (-9, "ModelError: of an earlier start.\n", "It was killed by SIGKILL (out of memory?)."),
        (None, "", "It ended (its exit code is unknown, since another gateway had started it)."),
        (1, "", "It exited with code 1."),
    ],
)
def test_an_end_is_told_by_code_or_signal_and_never_by_a_progress_bar(
    tmp_path: Path, code: int | None, log: str, told: str
) -> None:
    (tmp_path / "log").write_text(log)
    assert exit_message("It", code, tmp_path / "log") == told


def run_with(events: list[Any]) -> tuple[FinetuneExecutor, Any]:
    executor = FinetuneExecutor(LocalLauncher())
    engine = record(EngineState.RUNNING, id="engine-a", kind=EngineKind.FINETUNE)
    run = RunDirectory(executor._manager.root / "task-a")
    run.path.mkdir(parents=True)
    run.spec_path.write_text("{}")
    run.events_path.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return executor, engine


def test_a_run_whose_events_cannot_be_read_is_told_and_can_be_stopped() -> None:
    executor, engine = run_with([{"event": "started", "step": 0, "total_steps": 5}, {"event": "checkpoint"}])
    observed = asyncio.run(executor.observe(engine))
    assert not observed.alive
    if observed.reason is not None and observed.reason.code == "run_unreadable":
        assert "events cannot be read" in observed.reason.message
    asyncio.run(executor.request_stop(engine, force=True))


def test_a_malformed_step_is_passed_over() -> None:
    step = {"event": "step", "step": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": None, "token_accuracy": None,
            "tokens_per_second": None}  # fmt: skip
    executor, engine = run_with([{"event": "step"}, step, {"event": "step", "step": "x", "loss": []}])
    assert [told.step for told in asyncio.run(executor.training_steps(engine))] == [1]


def test_a_run_whose_folder_is_gone_is_told() -> None:
    executor = FinetuneExecutor(LocalLauncher())
    engine = record(EngineState.RUNNING, id="engine-a", kind=EngineKind.FINETUNE)
    observed = asyncio.run(executor.observe(engine))
    assert not observed.alive
    assert observed.reason is not None
    assert observed.reason.code == "task_not_found"


class NVMLError(Exception):
    """As NVIDIA's library raises it for what a device does not know."""


def unsupported(_: int) -> Any:
    raise NVMLError("Not Supported")


class Nvml:
    """Four GPUs: an ordinary one, a divided one, a virtual one, and one that is lost."""

    NVMLError = NVMLError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index if index < 3 else unsupported(index)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return f"GPU {handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=50) if handle == 0 else unsupported(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80, used=8) if handle < 2 else unsupported(handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:  # noqa: N802
        return unsupported(handle)


def test_what_a_gpu_does_not_know_fails_neither_the_list_nor_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_nvml", Nvml)
    devices = inventory.list_devices()
    assert [(device.name, device.utilization_percent) for device in devices[:2]] == [("GPU 0", 50.0), ("GPU 1", None)]
    assert devices[2].kind == "cpu"
    assert inventory.gpu_memory_of(1) is None
    assert list(engine_metrics([], devices))


def test_no_gpu_is_listed_if_the_driver_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Nvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            return int(unsupported(0))

    monkeypatch.setattr(inventory, "_nvml", Broken)
    assert [device.kind for device in inventory.list_devices()] == ["cpu"]
