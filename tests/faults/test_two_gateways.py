"""Two gateways share one PostgreSQL database.

In the first test, both belong to one node, and one is suspended during a write. In the second, they belong to two nodes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from postgres import PostgresServer
from sqlalchemy import create_engine, text
from support import SAMPLES, free_port, wait_for

from sage.common.errors import SageError
from sage.llm.client import SageClient
from sage.llm.control_plane.store.leases import LEASE_SECONDS

_PROGRAM = Path(__file__).parent.parent / "suspending_gateway.py"
_TABLES = ("engines", "servers", "engine_events")


class Gateway:
    """A gateway process with its own log file."""

    def __init__(self, home: Path, database_url: str, *arguments: str, lease_seconds: float, point: str = "never") -> None:
        self.port = free_port()
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / f"{self.port}.log"
        settings = {"HOME": str(home), "DATABASE_URL": database_url, "GATEWAY_PORT": str(self.port), "LOG_LEVEL": "DEBUG"}
        environment = {**os.environ, **{f"SAGE_{name}": value for name, value in settings.items()}}
        command = [sys.executable, str(_PROGRAM), str(lease_seconds), point, *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.client = SageClient(f"http://127.0.0.1:{self.port}")
        wait_for(self.role, "the gateway")

    def role(self) -> str:
        """Return the role that `/ready` reports, or an empty string if the gateway does not answer."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return str(httpx.get(f"http://127.0.0.1:{self.port}/ready", timeout=1, trust_env=False).json()["role"])
        except httpx.TransportError:
            return ""

    def state(self, engine_id: str) -> str:
        return str(self.client.get_engine(engine_id).state)

    def until(self, engine_id: str, state: str) -> None:
        wait_for(lambda: self.state(engine_id) == state, f"{engine_id}: {state}")

    def is_suspended(self) -> bool:
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def answers(self, engine_id: str) -> bool:
        """Chat with an engine through this gateway. Raises SageError if the request fails."""
        messages = [{"role": "user", "content": "Hello"}]
        self.client.chat(engine_id, messages, max_tokens=2)
        return True


Start = Callable[..., Gateway]


@pytest.fixture
def database_url(postgres: PostgresServer) -> str:
    return postgres.create_database()


@pytest.fixture
def start(database_url: str, sage_home: Path) -> Iterator[Start]:
    """A function that starts a gateway. After the test, the gateways are killed."""
    started: list[Gateway] = []

    def start_one(*arguments: str, home: Path = sage_home, lease_seconds: float = LEASE_SECONDS, **values: Any) -> Gateway:
        started.append(Gateway(home, database_url, *arguments, lease_seconds=lease_seconds, **values))
        return started[-1]

    yield start_one
    for gateway in started:
        gateway.process.kill()
        gateway.process.wait()


def rows(database_url: str) -> list[list[Any]]:
    """Return everything that control planes write, except the lease itself."""
    database = create_engine(database_url)
    with database.connect() as connection:
        found = [[tuple(row) for row in connection.execute(text(f"SELECT * FROM {table} ORDER BY id"))] for table in _TABLES]
    database.dispose()
    return found


@pytest.mark.parametrize(
    ("point", "lease_seconds", "suspended_seconds"),
    [
        pytest.param("add", 2.0, 0.0, marks=pytest.mark.long),
        ("transition", 2.0, 0.0),
        pytest.param("commit", 2.0, 0.0, marks=pytest.mark.long),
        pytest.param("add", LEASE_SECONDS, 20.0, marks=pytest.mark.long),
        pytest.param("transition", LEASE_SECONDS, 20.0, marks=pytest.mark.long),
    ],
)
def test_a_gateway_suspended_during_a_write_writes_nothing_after_the_other_gateway_took_over(
    point: str, lease_seconds: float, suspended_seconds: float, tiny_model: Path, start: Start, database_url: str
) -> None:
    active = start(lease_seconds=lease_seconds, point=point)
    standby = start("--standby", lease_seconds=lease_seconds)
    assert (active.role(), standby.role()) == ("active", "standby")
    with pytest.raises(SageError) as caught:
        standby.client.start_engine(model=str(tiny_model))
    assert caught.value.code == "standby"
    served = active.client.start_engine(model=str(tiny_model), name="first").id
    standby.until(served, "running")

    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(active.client.start_engine, model=str(tiny_model), name="second")
        wait_for(active.is_suspended, "the suspension")
        began_seconds = time.monotonic()
        while standby.role() == "standby":
            assert standby.state(served) == "running"
            assert standby.answers(served)
        assert time.monotonic() - began_seconds < 10
        written = _settled(standby, database_url)
        wait_for(lambda: time.monotonic() - began_seconds > suspended_seconds, "the end of the suspension")
        active.process.send_signal(signal.SIGCONT)
        wait_for(lambda: active.role() == "standby", "the return of the suspended gateway")
        if point == "transition":
            request.result()
            # The second text appears if the gateway was suspended inside a transaction: PostgreSQL then closes the session.
            refused = ("was changed after it was read", "server closed the connection")
            wait_for(lambda: any(words in active.log.read_text() for words in refused), "the write that is refused")
        else:
            with pytest.raises(SageError):
                request.result()
    assert rows(database_url) == written
    assert standby.role() == "active"
    assert active.answers(served)  # a standby answers, too


def _settled(gateway: Gateway, database_url: str) -> list[list[Any]]:
    """Wait until every engine runs, and return the rows of the database at this time."""
    wait_for(lambda: all(engine.state == "running" for engine in gateway.client.list_engines()), "running engines")
    return rows(database_url)


@pytest.mark.long
def test_two_nodes_on_one_database_do_not_change_the_engines_of_each_other(
    tiny_model: Path, tmp_path: Path, sage_home: Path, start: Start
) -> None:
    options = {"dataset_path": str(SAMPLES), "output_dir": str(tmp_path / "out"), "batch_size": 1, "num_epochs": 400}
    one, two = start(), start(home=sage_home / "another-home")
    assert (one.role(), two.role()) == ("active", "active")
    served = one.client.start_engine(model=str(tiny_model)).id
    trained = two.client.start_engine(model=str(tiny_model), engine_kind="finetune", options=options, restart_policy="no").id
    one.until(served, "running")
    two.until(trained, "running")
    assert {engine.id for engine in one.client.list_engines()} == {served, trained}
    for gateway, other in ((two, served), (one, trained)):
        for refused in (gateway.client.stop_engine, gateway.client.remove_engine, gateway.client.get_logs):
            with pytest.raises(SageError) as caught:
                refused(other)
            assert caught.value.code == "other_node"
    with pytest.raises(SageError, match="serves the model"):
        two.answers(served)

    pid = two.client.get_engine(trained).pid
    assert pid is not None
    two.process.kill()
    two.process.wait()
    os.kill(pid, signal.SIGKILL)
    # The first gateway stops its own engine, so it has reconciled. It must not change the dead run of the other node.
    one.client.stop_engine(served)
    one.until(served, "stopped")
    assert one.state(trained) == "running"
    again = start(home=sage_home / "another-home")
    again.until(trained, "failed")
