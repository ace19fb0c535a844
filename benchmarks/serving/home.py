"""Run a gateway in a separate SAGE_HOME, and start and stop engines."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sage.common.paths import get_user_paths
from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineState, EngineView

_POLL_SECONDS = 0.02
_START_SECONDS = 60


@contextlib.contextmanager
def gateway(home: Path) -> Iterator[SageClient]:
    """Run a gateway with `home` as SAGE_HOME and with this user's backends, and yield a client of this gateway.

    All engines are stopped when the block ends.
    """
    backends = get_user_paths().data_dir / "backends"
    (home / "data").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (home / "data" / "backends").symlink_to(backends)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"SAGE_GATEWAY_PORT": str(port), "SAGE_ENGINE_START_SECONDS": "600", "SAGE_LOG_LEVEL": "WARNING"}
    os.environ.update(settings, SAGE_HOME=str(home))  # this process also needs SAGE_HOME, to compute the API keys of servers
    with (
        subprocess.Popen([sys.executable, "-m", "sage.llm.gateway"]) as process,
        SageClient(f"http://127.0.0.1:{port}", timeout_seconds=300) as client,
    ):
        try:
            _wait_for_health(client, process)
            yield client
            for engine in client.iter_engines():
                stop(client, engine.id)
        finally:
            process.terminate()


def start(client: SageClient, model: Path, name: str, backend: str, options: dict[str, Any]) -> tuple[EngineView, float]:
    """Start an engine and wait until it runs; return the engine and the seconds that the start took."""
    began = time.perf_counter()
    engine = client.start_engine(model=str(model), name=name, backend=backend, options=options)
    while engine.state is not EngineState.RUNNING:
        if engine.state in SETTLED:
            raise RuntimeError(engine.reason.message if engine.reason else f"{name} is {engine.state}.")
        time.sleep(_POLL_SECONDS)
        engine = client.get_engine(engine.id)
    return engine, time.perf_counter() - began


def stop(client: SageClient, engine_id: str) -> None:
    """Stop an engine, and wait until it has stopped."""
    if client.get_engine(engine_id).state not in SETTLED:
        client.stop_engine(engine_id, force=True)
    while client.get_engine(engine_id).state not in SETTLED:
        time.sleep(_POLL_SECONDS)


def _wait_for_health(client: SageClient, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(Exception):
            client.models()
            return
        time.sleep(_POLL_SECONDS)
    raise RuntimeError("The gateway did not start.")
