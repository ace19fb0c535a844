"""Finding the gateway, and starting it where there is none."""

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import typer

from sage.common.errors import Conflict, EngineError, GatewayUnreachable, SageError
from sage.common.logs import tail_lines
from sage.common.paths import get_user_paths
from sage.common.processes import ProcessIdentity, ProcessSpec, holder, spawn
from sage.llm.client import SageClient

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def lock_path() -> Path:
    """Return the lock that this user's gateway holds."""
    return get_user_paths().state_dir / "gateway.lock"


def log_path() -> Path:
    """Return the log of a gateway in the background."""
    return get_user_paths().state_dir / "gateway.log"


def find_client() -> SageClient:
    """Return a client of the gateway that runs, or of where the settings say that one is; does not connect."""
    process = holder(lock_path())
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads((get_user_paths().state_dir / "gateway.json").read_text(encoding="utf-8"))
        if process and told["pid"] == process.pid:  # not an earlier gateway's; spares reading the settings
            return SageClient(told["url"], told["api_key"])
    from sage.common.settings import load_settings

    settings = load_settings()
    return SageClient(settings.gateway_url, settings.api_key.get_secret_value() if settings.api_key else None)


def connect() -> SageClient:
    """Return a client of a gateway that answers, starting one on this machine where none does."""
    client = find_client()
    if answers(client):
        return client
    if urlsplit(client.base_url).hostname not in _LOOPBACK:
        raise GatewayUnreachable(
            code="gateway_unreachable", message=f"The gateway at {client.base_url} does not answer.",
            hint="It is on another machine: start it there, or correct SAGE_GATEWAY_HOST.",
        )  # fmt: skip
    start()
    return find_client()


def answers(client: SageClient) -> bool:
    """Return whether a SAGE gateway answers."""
    try:
        return client.health().get("service") == "sage-gateway"
    except SageError:
        return False


def start(host: str | None = None, port: int | None = None) -> ProcessIdentity:
    """Start the gateway in the background and wait until it answers.

    Raises GatewayUnreachable with what it said where it does not come up, or where the settings name another machine.
    """
    argv = [sys.executable, "-m", "sage.llm.gateway"]
    argv += ["--host", host] if host else []
    argv += ["--port", str(port)] if port else []
    typer.echo(f"Starting the gateway in the background (log: {log_path()}).", err=True)
    try:
        process: ProcessIdentity | None = spawn(ProcessSpec(tuple(argv), lock_path(), log_path()))
    except Conflict:  # another command was quicker
        process = holder(lock_path())
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        is_alive = holder(lock_path()) is not None
        if not is_alive:
            said = (tail_lines(log_path(), 1) or ["nothing"])[0]
            raise GatewayUnreachable(code="gateway_failed", message=f"The gateway did not start: {said}")
        if is_alive and process and answers(find_client()):
            return process
        time.sleep(_POLL_SECONDS)
    raise GatewayUnreachable(
        code="gateway_slow", message=f"The gateway did not answer within {_START_SECONDS:.0f} s.",
        hint=f"Its log is {log_path()}.",
    )  # fmt: skip


def stop() -> bool:
    """End the gateway and wait until it has gone; engines live on. False where none ran."""
    process = holder(lock_path())
    if process is None:
        return False
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _START_SECONDS
    while holder(lock_path()):
        if time.monotonic() > deadline:
            raise EngineError(
                code="gateway_stuck", message=f"The gateway (PID {process.pid}) does not end.",
                hint=f"`kill -9 {process.pid}` ends it; its engines live on.",
            )  # fmt: skip
        time.sleep(_POLL_SECONDS)
    return True
