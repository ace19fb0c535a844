"""Fixtures: each test has an empty SAGE_HOME and no network."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_cpp import link_backend
from postgres import PostgresServer, postgres_server
from support import SAMPLES, free_port, make_tiny_model

from sage.common.processes import held_lock, holder
from sage.libs.models.export.formats import LlamaCpp
from sage.llm.control_plane.backends import environments

pytest.register_assert_rewrite("store_promises", "outbox_promises", "lease_promises", "migration_promises")
# Set a handler for SIGINT. If pytest is a background job of a shell, SIGINT is ignored in pytest and in the commands that
# the tests start, so that tests of Ctrl-C would time out.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def sage_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the path of an empty SAGE_HOME. After the test, processes that hold a lock in it are killed."""
    home = tmp_path / "sage-home"
    for name in [name for name in os.environ if name.startswith("SAGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAGE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAGE_GATEWAY_PORT", str(free_port()))
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0.1")
    yield home
    for lock in home.rglob("*.lock"):
        if (process := holder(lock)) and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Qwen2 model with about 100,000 random parameters, created once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "tiny-qwen2"
    with held_lock(shared / "tiny-qwen2.lock"):
        if not (folder / "config.json").exists():
            make_tiny_model(folder)
    return folder


@pytest.fixture
def llama_cpp(sage_home: Path) -> LlamaCpp:
    """Link the llama.cpp that `make integration` installed into this test's SAGE_HOME, and return it."""
    link_backend("llamacpp", sage_home)
    return LlamaCpp(Path(environments.interpreter("llamacpp")))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run a real PostgreSQL server. Each test creates a separate database on it."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    """Return a copy of the sample chats, which the test may change."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(SAMPLES.read_bytes())
    return path
