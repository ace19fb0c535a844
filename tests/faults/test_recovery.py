"""The whole product after a kill, with a full disk, and after a step of the clock.

The gateway must report the true states of its engines, and no data may be lost.
"""

import contextlib
import functools
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from clock import SteppedClock
from support import SAMPLES, free_port, sage, wait_for
from training import TinyRun

from sage.common.errors import SageError
from sage.common.processes import holder
from sage.llm.client import SageClient
from sage.llm.client.types import EngineView, TrainingProgress

pytestmark = pytest.mark.timeout(600)
#: When the gateway is ready, the states that it reports must be correct within this number of seconds.
RECOVERY_SECONDS = 5.0
LIVES = ("starting", "running", "stopping")


def client() -> SageClient:
    return _client(os.environ["SAGE_GATEWAY_PORT"])


@functools.cache
def _client(port: str) -> SageClient:
    """Return the shared client of a gateway. A client keeps a connection, and some gateways here accept few connections."""
    return SageClient(f"http://127.0.0.1:{port}")


def processes(home: Path) -> set[int]:
    """Return the PIDs of all processes whose SAGE_HOME is `home`."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SAGE_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def kill(*pids: int | None) -> None:
    for pid in pids:
        assert pid
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids if pid),
             "the end of the processes")  # fmt: skip


def kill_gateway(home: Path) -> None:
    kill(client().health()["pid"])
    wait_for(lambda: holder(home / "state/gateway.lock") is None, "the end of the gateway")


def train(model: Path, output: Path, **options: object) -> EngineView:
    values = {"dataset_path": str(SAMPLES), "output_dir": str(output), "batch_size": 1, "precision": "fp32", **options}
    return client().start_engine(model=str(model), engine_kind="finetune", options=values, restart_policy="no")


def is_in(engine: EngineView, *states: str) -> bool:
    return client().get_engine(engine.id).state in states


def until(engine: EngineView, state: str) -> EngineView:
    wait_for(lambda: is_in(engine, state, "failed", "completed", "stopped"), f"{engine.id} {state}")
    found = client().get_engine(engine.id)
    assert found.state == state, found
    return found


def expect(home: Path, *engines: tuple[EngineView, str]) -> None:
    """Check that exactly these engines exist, and that they reach these states soon after the gateway is ready.

    Also check that only the gateway and the engines have processes in the home.
    """
    wait_for(lambda: httpx.get(f"{client().base_url}/ready").status_code == 200, "the gateway")
    deadline = time.monotonic() + RECOVERY_SECONDS
    for engine, state in engines:
        wait_for(
            lambda engine=engine, state=state: is_in(engine, state), f"{engine.id} {state}", deadline - time.monotonic()
        )
    listed = client().list_engines()
    assert {engine.id for engine in listed} == {engine.id for engine, _ in engines}
    for engine in listed:
        assert (engine.pid is not None) == (engine.state in LIVES), engine
    leaders = {os.getsid(pid) for pid in processes(home)}
    assert leaders == {client().health()["pid"]} | {engine.pid for engine in listed if engine.pid}


@pytest.mark.long
def test_killed_engines_are_reported_and_the_resumed_run_has_the_same_result(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    options = {"save_steps": 5, "max_steps": 400, "batch_size": 4}
    sage("gateway", "start")
    serving = client().start_engine(model=str(tiny_model))
    run = train(tiny_model, tmp_path / "out", learning_rate=1e-2, **options)
    serving, run = until(serving, "running"), until(run, "running")

    def has_saved(run: EngineView, more_than: int) -> bool:
        training = client().get_engine(run.id).training
        return bool(training and (training.checkpoint_step or 0) > more_than)

    wait_for(lambda: has_saved(run, 0), "a checkpoint")
    kill_gateway(sage_home)
    sage("gateway", "start")
    expect(sage_home, (serving, "running"), (run, "running"))
    assert {client().get_engine(engine.id).pid for engine in (serving, run)} == {serving.pid, run.pid}

    kill(client().health()["pid"], client().get_engine(run.id).pid)
    sage("gateway", "start")
    expect(sage_home, (serving, "running"), (run, "failed"))
    engine = client().get_engine(run.id)
    assert engine.reason is not None
    assert "checkpoint" in engine.reason.hint
    assert engine.training is not None
    saved = engine.training.checkpoint_step or 0
    client().resume_engine(run.id)
    run = until(run, "running")
    wait_for(lambda: has_saved(run, saved), "another checkpoint")

    kill(client().health()["pid"], serving.pid, run.pid)
    sage("gateway", "start")
    expect(sage_home, (serving, "failed"), (run, "failed"))
    client().resume_engine(run.id)
    client().resume_engine(serving.id)
    until(run, "completed")
    until(serving, "running")
    expect(sage_home, (serving, "running"), (run, "completed"))
    client().stop_engine(serving.id)
    expect(sage_home, (serving, "stopped"), (run, "completed"))
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_one_of_two_concurrent_starts_is_refused_if_they_use_the_same_port_or_output_folder(
    tmp_path: Path, sage_home: Path, tiny_model: Path
) -> None:
    start = ("llm", "engine", "start")
    train = (*start, str(tiny_model), "--engine-kind", "finetune", "--dataset", str(SAMPLES), "--max-steps", "3", "--output")
    one_port = (*start, str(tiny_model), "--port", str(free_port()), "--no-wait")
    one_output, other_output = ((*train, str(tmp_path / name), "--no-wait") for name in ("out", "other"))
    one_gguf = (*start, "smollm2-135m-instruct", "--no-wait")
    commands = [one_port, one_port, one_output, one_output, other_output, one_gguf, one_gguf]
    with ThreadPoolExecutor(len(commands)) as pool:  # each command starts the gateway if no gateway runs
        done = list(pool.map(lambda command: sage(*command, check=None), commands))
    for first, second, code in ((done[0], done[1], "Port"), (done[2], done[3], "output folder")):
        assert sorted([first.returncode, second.returncode]) == [0, 1], (first, second)
        assert code in next(one.stderr for one in (first, second) if one.returncode)
    assert [one.returncode for one in done[4:]] == [0, 0, 0], done[4:]

    # If a start is rejected during its validation, its id is printed, and the failed engine stays in the list.
    for rejected in {one.stdout.strip() for one in done if one.returncode} - {""}:
        assert client().get_engine(rejected).state == "failed"
        client().remove_engine(rejected)
    engines = client().list_engines()
    assert len(engines) == 5
    ends = {engine.id: "completed" if engine.kind == "finetune" else "running" for engine in engines}
    for engine in engines:
        until(engine, ends[engine.id])
    expect(sage_home, *((engine, ends[engine.id]) for engine in engines))
    assert len(list((sage_home / "data/models/.converted").glob("*/config.json"))) == 1
    assert len(list((sage_home / "cache/tokenized").glob("*/facts.json"))) == 1
    for engine in engines:
        client().stop_engine(engine.id)
    for engine in engines:
        until(engine, "completed" if engine.kind == "finetune" else "stopped")
    expect(sage_home, *((engine, client().get_engine(engine.id).state) for engine in engines))


@pytest.mark.long
@pytest.mark.skipif(not SteppedClock.is_available(), reason="there is no C compiler to build a clock that can be set")
def test_a_step_of_the_clock_does_not_affect_the_gateway_or_its_engines(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    clock = SteppedClock(tmp_path)
    sage("gateway", "start", env=clock.environment)
    serving = client().start_engine(model=str(tiny_model))
    run = train(tiny_model, tmp_path / "out", num_epochs=2000, batch_size=4)
    serving, run = until(serving, "running"), until(run, "running")

    def training() -> TrainingProgress:
        found = client().get_engine(run.id).training
        assert found
        return found

    for step_seconds in (3, -3, 3600, -3600):
        clock.set(step_seconds)
        seen = training().step
        wait_for(lambda seen=seen: training().step > seen + 20, "training to go on")
        expect(sage_home, (serving, "running"), (run, "running"))
        assert {client().get_engine(engine.id).pid for engine in (serving, run)} == {serving.pid, run.pid}
        assert 0 <= (training().eta_seconds or 0) < 3600
        ask = {"model": serving.id, "prompt": "Hi", "max_tokens": 1}
        assert httpx.post(f"{client().base_url}/v1/completions", json=ask, timeout=60).status_code == 200
        kill_gateway(sage_home)
        sage("gateway", "start", env=clock.environment)
        expect(sage_home, (serving, "running"), (run, "running"))
    for engine in (run, serving):
        client().stop_engine(engine.id)
        until(engine, "stopped")
    expect(sage_home, (serving, "stopped"), (run, "stopped"))
    clock.set(0)
    client().resume_engine(run.id)
    until(run, "running")
    client().stop_engine(run.id, force=True)
    expect(sage_home, (serving, "stopped"), (run, "failed"))  # a forced stop loses the last steps, so the run is failed


@pytest.fixture
def small_disk(sage_home: Path) -> Iterator[Path]:
    """Mount a small file system at the home, and yield the home."""
    sage_home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(sage_home)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield sage_home
    for pid in processes(sage_home):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["umount", "--lazy", str(sage_home)], check=True)


def fill(path: Path) -> None:
    for size in (65536, 512):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while True:
                file.write(b"0" * size)


@pytest.mark.long
def test_a_full_disk_is_reported_and_no_data_is_lost(tiny_model: Path, tmp_path: Path, small_disk: Path) -> None:
    options = {"max_steps": 600, "save_steps": 50, "batch_size": 4, "learning_rate": 1e-2}
    sage("gateway", "start")
    serving = client().start_engine(model=str(tiny_model))
    run = train(tiny_model, tmp_path / "out", **options)
    serving, run = until(serving, "running"), until(run, "running")
    wait_for(lambda: (training := client().get_engine(run.id).training) and training.checkpoint_step, "a checkpoint")
    fill(small_disk / "filler")
    wait_for(lambda: client().get_engine(run.id).pid is None, "the end of the run")
    for _ in range(3):  # starts are refused with a reason, and requests are still answered
        fill(small_disk / "filler")  # fill the space that the run had reserved for its last events
        with pytest.raises(SageError, match=r"No space left on device|full"):
            train(tiny_model, tmp_path / "other")
        ask = {"model": serving.id, "prompt": "Hi", "max_tokens": 1}
        assert httpx.post(f"{client().base_url}/v1/completions", json=ask, timeout=60).status_code == 200
    kill_gateway(small_disk)
    start = sage("gateway", "start", check=None)  # few bytes are free, so the start may fail
    assert start.returncode == 0 or "No space left on device" in start.stderr
    assert "Traceback" not in start.stderr

    (small_disk / "filler").unlink()
    sage("gateway", "start")
    expect(small_disk, (serving, "running"), (run, "failed"))
    reason = client().get_engine(run.id).reason
    assert reason is not None
    assert "disk" in f"{reason.code} {reason.message}"
    assert client().get_engine(serving.id).pid == serving.pid
    client().resume_engine(run.id)
    until(run, "completed")
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_a_gateway_with_few_descriptors_reports_correct_states_after_a_suspension(
    tiny_model: Path, tmp_path: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENGINE_UNRESPONSIVE", "STOP"):  # the gateway is suspended for longer than these limits
        monkeypatch.setenv(f"SAGE_{name}_SECONDS", "2")
    sage("gateway", "start", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    serving, killed = (client().start_engine(model=str(tiny_model)) for _ in range(2))
    run = train(tiny_model, tmp_path / "out", num_epochs=2000, batch_size=4)
    serving, killed, run = (until(engine, "running") for engine in (serving, killed, run))
    gateway = client().health()["pid"]
    address = ("127.0.0.1", int(os.environ["SAGE_GATEWAY_PORT"]))
    os.kill(gateway, signal.SIGSTOP)
    with contextlib.ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(contextlib.closing(socket.create_connection(address)))
        kill(killed.pid)
        time.sleep(5)  # the gateway must not count its own suspension as a hang of its engines
        os.kill(gateway, signal.SIGCONT)
    expect(sage_home, (serving, "running"), (killed, "failed"), (run, "running"))
    ask = {"model": serving.id, "prompt": "Hi", "max_tokens": 1}
    assert httpx.post(f"{client().base_url}/v1/completions", json=ask, timeout=60).status_code == 200
    os.kill(gateway, signal.SIGSTOP)
    assert "stopped" in sage("gateway", "stop").stdout
    sage("gateway", "start")
    expect(sage_home, (serving, "running"), (killed, "failed"), (run, "running"))
    client().stop_engine(run.id)
    until(run, "stopped")
