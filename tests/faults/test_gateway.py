"""A gateway is suspended, killed, or short of file descriptors. Afterwards it reports the actual states of its engines."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import SAGE, SAMPLES, free_port, sage, wait_for

from sage.common.errors import SageError
from sage.common.identity import session_members
from sage.common.processes import holder
from sage.llm.client import SageClient
from sage.llm.client.types import EngineView


def client() -> SageClient:
    return SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")


def is_in(engine: EngineView, state: str) -> bool:
    return client().get_engine(engine.id).state == state


def train(model: Path, output: Path) -> EngineView:
    options = {"dataset_path": str(SAMPLES), "output_dir": str(output), "batch_size": 1, "num_epochs": 400}
    return client().start_engine(model=str(model), engine_kind="finetune", options=options, restart_policy="no")


@pytest.mark.long
def test_a_gateway_that_could_not_observe_its_engines_reports_the_actual_states_afterwards(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    sage("gateway", "start")
    gateway = client().health()["pid"]
    trained, killed = train(tiny_model, tmp_path / "a"), train(tiny_model, tmp_path / "b")
    for engine in (trained, killed):
        wait_for(lambda engine=engine: is_in(engine, "running"), "training")

    before = resource.prlimit(gateway, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{gateway}/fd").iterdir()))
    resource.prlimit(gateway, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    address = ("127.0.0.1", int(os.environ["SAGE_GATEWAY_PORT"]))
    with contextlib.ExitStack() as clients:  # these connections use up the file descriptors
        for _ in range(20):
            clients.enter_context(socket.create_connection(address))
        log = sage_home / "state/gateway.log"
        wait_for(
            lambda: "cannot be observed" in log.read_text() and "Too many open files" in log.read_text(), "a failed probe"
        )
    resource.prlimit(gateway, resource.RLIMIT_NOFILE, before)
    assert is_in(trained, "running")
    assert is_in(killed, "running")

    pid = client().get_engine(killed.id).pid
    assert pid is not None
    os.kill(gateway, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not session_members(pid), "the end of the run")
    os.kill(gateway, signal.SIGCONT)
    wait_for(lambda: is_in(killed, "failed"), "the actual state", seconds=5)
    assert is_in(trained, "running")
    client().stop_engine(trained.id)
    wait_for(lambda: is_in(trained, "stopped"), "the end of the other run")


def test_a_gateway_killed_in_the_middle_of_starts_and_stops_leaves_nothing_behind(tiny_model: Path, sage_home: Path) -> None:
    def kill_gateway() -> None:
        os.kill(client().health()["pid"], signal.SIGKILL)
        wait_for(lambda: holder(sage_home / "state/gateway.lock") is None, "the end of the gateway")

    def start(_: int) -> EngineView | None:
        with contextlib.suppress(SageError):  # refused, or the gateway is gone
            return client().start_engine(model=str(tiny_model), port=port)
        return None

    port = free_port()
    sage("gateway", "start")
    with ThreadPoolExecutor(4) as pool:
        starts = pool.map(start, range(4))
        wait_for(lambda: client().list_engines(), "a start")
        kill_gateway()
        list(starts)
    sage("gateway", "start")
    (engine,) = client().list_engines()
    wait_for(lambda: is_in(engine, "running"), "the engine")
    pid = client().get_engine(engine.id).pid
    assert pid is not None
    client().stop_engine(engine.id, force=True)
    kill_gateway()
    sage("gateway", "start")
    wait_for(lambda: is_in(engine, "stopped"), "the end of the engine", seconds=5)
    assert session_members(pid) == []


def test_a_gateway_in_the_foreground_is_found_and_stopped_after_a_change_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = subprocess.Popen([SAGE[0], "-m", "sage.llm.gateway"], stderr=subprocess.DEVNULL)
    wait_for(lambda: sage("gateway", "status", check=None).returncode == 0, "the gateway")
    (tmp_path / "sitecustomize.py").write_text(  # for the command line, the clock and the boot time are one hour back
        "import time, psutil._pslinux as linux\n"
        "boot_time, now = linux.boot_time, time.time\n"
        "linux.boot_time = lambda: boot_time() - 3600\n"
        "time.time = lambda: now() - 3600\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert json.loads(sage("gateway", "status", "--json").stdout)["pid"] == gateway.pid
    assert "is already running" in sage("gateway", "start").stdout
    assert "stopped" in sage("gateway", "stop").stdout
    gateway.wait(30)
