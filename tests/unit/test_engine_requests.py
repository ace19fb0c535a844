"""Requests that are rejected before anything is started, and observations of engines."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from engines import record, server
from pydantic import ValidationError

from sage.common.errors import ConfigError
from sage.common.training import TrainingProgress
from sage.llm.client.types import EngineKind, EngineState, StartRequest
from sage.llm.control_plane.executors import inference_executor
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.executors.exit_message import exit_message
from sage.llm.control_plane.executors.finetune_executor import FinetuneExecutor
from sage.llm.control_plane.executors.inference_executor import InferenceExecutor
from sage.llm.control_plane.launchers.base import ProcessObservation, Signal
from sage.llm.control_plane.launchers.local import LocalLauncher
from sage.llm.control_plane.store.records import EngineRecord, ServerState


@pytest.mark.parametrize("model", ["./out", "../out", "~/out", "~nosuchuser/x", "a\\b", ".", ".."])
def test_a_folder_without_an_absolute_path_is_rejected(model: str) -> None:
    with pytest.raises(ValidationError, match="absolute path"):
        StartRequest(model=model)


@pytest.mark.parametrize("model", ["", "x" * 513, "a\nb", "a\0b", "a\ud83d"])
def test_an_invalid_model_name_is_rejected(model: str) -> None:
    with pytest.raises(ValidationError):
        StartRequest(model=model)


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B-Instruct", "/home/me/my models/out", "smollm2", "x" * 512])
def test_model_names_are_kept_unchanged(model: str) -> None:
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
def test_files_need_absolute_paths_because_the_gateway_has_another_working_directory(options: dict[str, Any]) -> None:
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
        (None, "", "It exited (the exit code is unknown, because another gateway started the process)."),
        (1, "", "It exited with code 1."),
    ],
)
def test_an_exit_is_explained_by_code_or_signal_and_never_by_a_progress_bar(
    tmp_path: Path, code: int | None, log: str, told: str
) -> None:
    (tmp_path / "log").write_text(log)
    assert exit_message("It", code, tmp_path / "log") == told


def run_with(events: list[Any]) -> tuple[FinetuneExecutor, EngineRecord]:
    finetune = FinetuneExecutor(LocalLauncher())
    engine = record(EngineState.RUNNING, id="engine-a", kind=EngineKind.FINETUNE, backend="trainer",
                    options={"output_dir": "/out"})  # fmt: skip
    run = finetune._run(engine)
    run.path.mkdir(parents=True)
    run.spec_path.write_text("{}")
    run.events_path.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return finetune, engine


def probe(
    finetune: FinetuneExecutor, engine: EngineRecord, state: ServerState = ServerState.LAUNCHED, **process: Any
) -> Observed:
    observation = ProcessObservation(**{"alive": False, **process})
    return asyncio.run(finetune.probe(engine, server(state, backend="trainer"), observation))


STARTED = [{"event": "launched"}, {"event": "started", "step": 0, "total_steps": 5}]


def test_a_run_with_a_damaged_event_is_observed_and_can_be_stopped() -> None:
    finetune, engine = run_with([*STARTED, {"event": "checkpoint"}])
    observed = probe(finetune, engine, alive=True)
    assert observed.alive
    launcher = LocalLauncher()
    asyncio.run(launcher.signal(finetune.plan_server(engine).handle, Signal.KILL))


@pytest.mark.parametrize(
    ("exit_code", "log", "message"),
    [
        (-9, "", "At step 0, the training process was killed by SIGKILL (out of memory?)."),
        (1, "ImportError: no torch\n", "At step 0, the training process exited with code 1: ImportError: no torch"),
        (None, "", "without reporting an error"),
        (0, "", "without reporting an error"),
    ],
)
def test_a_worker_that_exits_without_reporting_an_error_has_failed(exit_code: int | None, log: str, message: str) -> None:
    finetune, engine = run_with(STARTED)
    finetune.log_path(engine).write_text(log)
    observed = probe(finetune, engine, exit_code=exit_code)
    assert (observed.alive, observed.ended) == (False, EngineState.FAILED)
    assert observed.reason is not None
    assert observed.reason.code == "worker_died"
    assert message in observed.reason.message


def test_the_reported_end_of_a_run_is_observed_with_the_figures_of_the_run() -> None:
    finetune, engine = run_with([*STARTED, {"event": "finished", "step": 5, "output_dir": "/out"}])
    observed = probe(finetune, engine, alive=True)
    assert (observed.alive, observed.ended) == (True, EngineState.COMPLETED)  # its process is about to exit
    assert observed.training is not None
    assert observed.training.total_steps == 5


def test_before_a_launch_the_end_of_the_previous_launch_does_not_count() -> None:
    finetune, engine = run_with([*STARTED, {"event": "stopped", "step": 2}])
    assert probe(finetune, engine, ServerState.PLANNED).ended is None
    assert probe(finetune, engine, ServerState.LAUNCHED).ended is EngineState.STOPPED


def test_an_engine_whose_worker_left_processes_is_orphaned() -> None:
    finetune, engine = run_with(STARTED)
    observed = probe(finetune, engine, leftovers=True)
    assert (observed.alive, observed.orphaned, observed.ended) == (True, True, None)


def test_the_figures_of_a_settled_run_are_not_read_from_its_files() -> None:
    finetune, engine = run_with(STARTED)
    figures = TrainingProgress(step=3, loss=1.5).model_dump(mode="json")
    settled = dataclasses.replace(engine, state=EngineState.STOPPED, figures=figures)
    shutil.rmtree(finetune._run(engine).path)
    fields = finetune.view_fields(settled, None)
    assert fields["training"].loss == 1.5
    assert fields["task_id"] == "task-a"
    assert finetune.view_fields(dataclasses.replace(settled, figures=None), None)["training"] is None


def test_a_malformed_step_does_not_hide_other_steps() -> None:
    step = {"event": "step", "step": 1, "loss": 1.0, "learning_rate": 0.1}
    finetune, engine = run_with([{"event": "step"}, step, {"event": "step", "step": "x", "loss": []}])
    assert [found.step for found in asyncio.run(finetune.training_steps(engine, 0, None))] == [1]


@pytest.mark.parametrize(
    ("after", "max_points", "expected"),
    [(0, None, list(range(1, 11))), (0, 3, [1, 10]), (8, 3, [9, 10]), (0, 1, [10]), (10, 5, [])],
)
def test_steps_are_downsampled_and_the_first_and_the_last_are_kept(
    after: int, max_points: int | None, expected: list[int]
) -> None:
    finetune, engine = run_with([{"event": "step", "step": step, "loss": 1.0} for step in range(1, 11)])
    assert [found.step for found in asyncio.run(finetune.training_steps(engine, after, max_points))] == expected


def test_a_run_whose_folder_is_gone_is_reported() -> None:
    finetune = FinetuneExecutor(LocalLauncher())
    observed = probe(finetune, record(EngineState.RUNNING, id="engine-a", kind=EngineKind.FINETUNE))
    assert not observed.alive
    assert observed.reason is not None
    assert observed.reason.code == "task_not_found"


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Yield the address of a server that gives the same answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "ready"),
    [
        (200, '{"engine": "engine-a"}', True),
        (200, '{"engine": "engine-b"}', False),
        (200, "[]", False),
        (200, "not json", False),
        (503, '{"engine": "engine-a"}', False),
    ],
)
def test_a_server_is_ready_if_it_answers_its_health_check_with_its_own_name(status: int, body: str, ready: bool) -> None:
    alive = ProcessObservation(alive=True)
    with answering(status, body) as address:
        observed = asyncio.run(InferenceExecutor(LocalLauncher()).probe(record(), server(address=address), alive))
    assert (observed.alive, observed.ready) == (True, ready)


def test_a_server_whose_launch_was_not_stored_is_checked_at_the_address_of_its_process() -> None:
    with answering(200, '{"engine": "engine-a"}') as address:
        alive = ProcessObservation(alive=True, address=address)
        planned = server(ServerState.PLANNED, address=None)
        assert asyncio.run(InferenceExecutor(LocalLauncher()).probe(record(), planned, alive)).ready


def test_servers_that_do_not_answer_do_not_delay_the_checks_of_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = ProcessObservation(alive=True)

    async def test() -> None:
        inference = InferenceExecutor(LocalLauncher())
        with socket.create_server(("127.0.0.1", 0), backlog=500) as silent:
            hung = server(address=f"127.0.0.1:{silent.getsockname()[1]}")
            probes = [asyncio.create_task(inference.probe(record(), hung, alive)) for _ in range(150)]
            await asyncio.sleep(0)  # all these probes start before the probe of the next server
            with answering(200, '{"engine": "engine-a"}') as address:
                assert (await inference.probe(record(), server(address=address), alive)).ready
            assert not any(probe.done() for probe in probes)
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)

    monkeypatch.setattr(inference_executor, "_HEALTH_SECONDS", 60)
    asyncio.run(test())


def test_a_server_that_exited_is_reported_only_if_its_launch_was_stored() -> None:
    inference, dead = InferenceExecutor(LocalLauncher()), ProcessObservation(alive=False, exit_code=1)
    assert asyncio.run(inference.probe(record(), server(ServerState.PLANNED), dead)).reason is None
    observed = asyncio.run(inference.probe(record(), server(), dead))
    assert not observed.alive
    assert observed.reason is not None
    assert observed.reason.message == "The engine's process exited with code 1."
