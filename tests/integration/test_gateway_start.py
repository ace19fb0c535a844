"""Starts of the gateway: with invalid settings, several at once, as a standby, and with few file descriptors."""

import contextlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support import SAGE, engine_of, free_port, list_engines, sage, wait_for

from sage.common.processes import holder


@pytest.fixture
def log(sage_home: Path) -> Path:
    return sage_home / "state/gateway.log"


def refused(*arguments: str, exit_code: int = 3) -> str:
    """Check that a start of the gateway fails, and return the line with the error."""
    done = sage("gateway", "start", *arguments, check=exit_code)
    assert done.stdout == ""
    assert holder(Path(os.environ["SAGE_HOME"]) / "state/gateway.lock") is None
    return next(line for line in done.stderr.splitlines() if line.startswith("Error: "))


@contextlib.contextmanager
def port_in_use() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", int(os.environ["SAGE_GATEWAY_PORT"]))):
        yield


def test_every_start_reports_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0")
    for _ in range(2):
        assert "reconcile_seconds" in refused(exit_code=2)


def test_an_empty_key_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_API_KEY", "")
    assert "everyone" in refused("--host", "0.0.0.0")


def test_a_failed_start_reports_its_own_reason_and_not_the_reason_of_an_earlier_start(
    sage_home: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with port_in_use():
        assert "Address already in use" in refused()
    database = sage_home / "state/engines.db"
    assert not database.exists()  # a gateway that cannot use its port does not create the database
    database.write_bytes(b"garbage" * 1000)
    assert "not a database" in refused()
    database.unlink()
    database.mkdir()
    assert "database" in refused()
    database.rmdir()
    monkeypatch.setenv("SAGE_DATABASE_URL", "nosuch://sage:hunter2@127.0.0.1:1/sage")
    reason = refused()
    assert "nosuch" in reason
    assert "hunter2" not in reason + log.read_text()
    monkeypatch.delenv("SAGE_DATABASE_URL")
    assert "Traceback" not in log.read_text()
    assert "The gateway is running (PID" in sage("gateway", "start").stdout


def test_an_unusable_state_folder_is_reported_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "file"))
    for arguments in (("gateway", "start"), ("gateway", "stop"), ("llm", "engine", "list")):
        stderr = sage(*arguments, check=2).stderr
        assert f"The state folder {tmp_path}/file/state cannot be used: Not a directory." in stderr
        assert "set SAGE_HOME to another folder" in stderr


def test_the_gateway_of_another_home_is_not_used_unless_an_api_key_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sage("gateway", "start")
    theirs = holder_pid()
    with monkeypatch.context() as user:
        user.setenv("SAGE_HOME", str(tmp_path / "other-home"))
        for arguments in (("gateway", "status"), ("llm", "engine", "list")):
            stderr = sage(*arguments, check=3).stderr
            assert f"uses another SAGE_HOME folder. Gateway process: PID {theirs}, user " in stderr
            assert "set SAGE_GATEWAY_PORT" in stderr
        assert "Address already in use" in refused()
        user.setenv("SAGE_API_KEY", "the-key-of-a-shared-one")
        assert list_engines() == {}
    assert list_engines() == {}


def test_concurrent_starts_create_one_gateway_and_all_report_its_address() -> None:
    starts = [subprocess.Popen([*SAGE, "gateway", "start"], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {start.communicate(timeout=120)[0].replace(" already", "") for start in starts}
    assert [start.returncode for start in starts] == [0, 0, 0]
    assert len(outputs) == 1
    assert outputs.pop().startswith("The gateway is running (PID ")


@contextlib.contextmanager
def standby_gateway() -> Iterator[tuple[int, httpx.Client]]:
    """Run a standby gateway of this home. Yield its PID, and a client that sends requests to it."""
    port = free_port()
    argv = [sys.executable, "-m", "sage.llm.gateway", "--standby", "--port", str(port)]
    with subprocess.Popen(argv) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        try:
            wait_for(lambda: _role(client) is not None, "the standby's answer")
            yield process.pid, client
        finally:
            process.terminate()


def _role(client: httpx.Client) -> str | None:
    with contextlib.suppress(httpx.HTTPError):
        return str(client.get("/ready").json()["role"])
    return None


def test_a_second_gateway_of_one_home_is_refused_unless_it_is_a_standby() -> None:
    sage("gateway", "start")
    argv = [sys.executable, "-m", "sage.llm.gateway", "--port", str(free_port())]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert f"A gateway is already running (PID {holder_pid()})." in second.stderr
    active_pid = holder_pid()
    with standby_gateway() as (_, standby):
        assert _role(standby) == "standby"
        assert holder_pid() == active_pid


def test_a_standby_takes_over_if_the_active_gateway_is_killed_and_the_command_line_finds_it(sage_home: Path) -> None:
    sage("gateway", "start")
    with standby_gateway() as (pid, standby):
        os.kill(holder_pid(), signal.SIGKILL)
        wait_for(lambda: _role(standby) == "active", "the takeover", seconds=20)
        lock = sage_home / "state/gateway.lock"
        wait_for(lambda: (process := holder(lock)) is not None and process.pid == pid, "the lock", seconds=20)
        wait_for(lambda: holder_pid() == pid, "the published address", seconds=20)
        assert stat.S_IMODE((sage_home / "state/gateway.json").stat().st_mode) == 0o600
        assert list_engines() == {}


def test_the_command_line_uses_the_standby_that_took_over_from_a_suspended_gateway() -> None:
    sage("gateway", "start")
    suspended = holder_pid()
    with standby_gateway() as (pid, standby):
        os.kill(suspended, signal.SIGSTOP)
        try:
            wait_for(lambda: _role(standby) == "active", "the takeover", seconds=20)
            wait_for(lambda: holder_pid() == pid, "the published address", seconds=20)
            assert list_engines() == {}
        finally:
            os.kill(suspended, signal.SIGCONT)


def test_a_gateway_with_few_descriptors_refuses_some_connections_and_answers_again_later(tiny_model: Path) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model)))
    sage("gateway", "stop")
    sage("gateway", "start", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    address = ("127.0.0.1", int(os.environ["SAGE_GATEWAY_PORT"]))
    ask = {
        "url": f"http://127.0.0.1:{address[1]}/v1/completions",
        "json": {"model": engine, "prompt": "Hi", "max_tokens": 1},
    }

    def is_served() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.post(**ask, timeout=60).status_code == 200
        return False

    with contextlib.ExitStack() as held:
        for _ in range(150):
            connection = held.enter_context(contextlib.closing(socket.create_connection(address)))
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert psutil.Process(holder_pid()).num_fds() < 64
    wait_for(is_served, "an answer after the crowd", seconds=30)
    assert list_engines()[engine]["state"] == "running"


def holder_pid() -> int:
    return int(json.loads((Path(os.environ["SAGE_HOME"]) / "state/gateway.json").read_text())["pid"])


def test_if_an_engine_dies_during_an_answer_the_error_names_the_engine_and_not_the_gateway(tiny_model: Path) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "tiny"))
    pid = list_engines()[engine]["pid"]
    chat = subprocess.Popen(
        [*SAGE, "llm", "chat", "tiny", "--message", "Hi", "--max-tokens", "400", "--temperature", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert chat.stdout
    chat.stdout.read(1)
    os.kill(pid, signal.SIGKILL)
    _, output = chat.communicate(timeout=60)
    assert chat.returncode == 1
    assert engine in output.decode()
    assert "gateway" not in output.decode().lower()


def test_a_state_file_that_cannot_be_written_is_reported_without_a_traceback(sage_home: Path, log: Path) -> None:
    (sage_home / "state/gateway.json").mkdir(parents=True)
    assert "gateway.json" in refused()
    assert "Traceback" not in log.read_text()


def test_a_key_is_in_no_log_and_no_file_that_others_may_read(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_API_KEY", "sk-very-secret")
    sage("gateway", "start")
    list_engines()
    for file in (file for file in sage_home.rglob("*") if file.is_file()):
        mode = stat.S_IMODE(file.stat().st_mode)
        assert mode & 0o077 == 0, file
        assert b"sk-very-secret" not in file.read_bytes() or (file.name, mode) == ("gateway.json", 0o600)
