"""Find the running gateway, or start a gateway."""

import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import typer

from sage.cli import extras
from sage.common.errors import Conflict, EngineError, GatewayUnreachable, SageError
from sage.common.paths import get_user_paths, usable_state_folder
from sage.common.processes import ProcessIdentity, ProcessSpec, describe_exit, exit_code, holder, spawn
from sage.llm.client import SageClient

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
#: Prefix of the log line in which the gateway reports why it did not start.
_REASON = "sage gateway: "
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def lock_path() -> Path:
    """Return the path of the lock file that this user's gateway holds."""
    return get_user_paths().state_dir / "gateway.lock"


def log_path() -> Path:
    """Return the path of the log that a gateway in the background writes."""
    return get_user_paths().state_dir / "gateway.log"


def find_process() -> ProcessIdentity | None:
    """Return the process of this user's gateway; None if no gateway runs.

    Raises ConfigError if the state folder cannot be used.
    """
    with usable_state_folder():
        return holder(lock_path())


def find_client() -> SageClient:
    """Return a client for the running gateway, or for the address in the settings if no gateway runs."""
    with usable_state_folder(), contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads((get_user_paths().state_dir / "gateway.json").read_text(encoding="utf-8"))
        # A gateway that was started with --standby does not hold the lock, so check the process in gateway.json.
        if ProcessIdentity(saved["pid"], saved["started"]).is_alive():
            return SageClient(saved["url"], saved["api_key"])
    from sage.common.settings import load_settings

    settings = load_settings()
    return SageClient(settings.gateway_url, settings.api_key.get_secret_value() if settings.api_key else None)


def connect() -> SageClient:
    """Return a client for the running gateway. If no gateway answers and the client's address is local, start a gateway.

    Raises GatewayUnreachable if the address is on another machine and no gateway answers there.
    """
    client = find_client()
    if health := find_health(client):
        refuse_foreign(client, health)
        return client
    if urlsplit(client.base_url).hostname not in _LOOPBACK:
        raise GatewayUnreachable(
            code="gateway_unreachable", message=f"The gateway at {client.base_url} does not answer.",
            hint="Start the gateway on the machine that SAGE_GATEWAY_HOST names, or change SAGE_GATEWAY_HOST.",
        )  # fmt: skip
    start()
    return find_client()


def find_health(client: SageClient) -> dict[str, Any] | None:
    """Return the health of the gateway, or None if no SAGE gateway answers."""
    try:
        health = client.health()
    except SageError:
        return None
    return health if health.get("service") == "sage-gateway" else None


def refuse_foreign(client: SageClient, health: dict[str, Any]) -> None:
    """Raise GatewayUnreachable if the gateway belongs to another SAGE_HOME on this machine.

    The check is skipped if the client has an API key or if a gateway of this SAGE_HOME runs. A gateway on another machine,
    for example behind an SSH tunnel, is accepted.
    """
    if client.api_key or find_process():
        return
    with contextlib.suppress(psutil.Error, ValueError, TypeError):
        process = psutil.Process(health.get("pid", 0))
        if "sage.llm.gateway" in process.cmdline():
            raise GatewayUnreachable(
                code="gateway_foreign",
                message=f"The gateway at {client.base_url} uses another SAGE_HOME folder. "
                f"Gateway process: PID {process.pid}, user {process.username()}.",
                hint="To start your own gateway, set SAGE_GATEWAY_PORT to a free port. "
                "To use the running gateway, set SAGE_API_KEY to its key.",
            )


def start(host: str | None = None, port: int | None = None) -> ProcessIdentity:
    """Start the gateway in the background, unless it is running, and wait until it answers.

    Raises ConfigError if a setting is wrong. Raises GatewayUnreachable, with the reason, if the gateway does not start.
    """
    from sage.common.settings import load_settings

    extras.require("sage.llm.gateway", "A gateway on this machine")
    load_settings()  # check the settings here, because the gateway reports an error only in its log
    argv = [sys.executable, "-m", "sage.llm.gateway"]
    argv += ["--host", host] if host else []
    argv += ["--port", str(port)] if port else []
    deadline = time.monotonic() + _START_SECONDS
    process: ProcessIdentity | None = None
    log_bytes = 0
    while time.monotonic() < deadline:
        holding = find_process()
        if holding is None:
            if process:
                raise _failed(log_bytes)
            log_bytes = _size(log_path())
            with (
                contextlib.suppress(Conflict),
                usable_state_folder(),
            ):  # Conflict: another command is starting the gateway; wait for that gateway
                process = spawn(ProcessSpec(tuple(argv), lock_path(), log_path()))
                typer.echo(f"Starting the gateway in the background (log: {log_path()}).", err=True)
        elif (health := find_health(find_client())) and holding.pid in (0, health.get("pid")):
            return holding
        time.sleep(_POLL_SECONDS)
    raise GatewayUnreachable(
        code="gateway_slow", message=f"The gateway did not answer within {_START_SECONDS:.0f} s.",
        hint=f"The gateway's log is {log_path()}.",
    )  # fmt: skip


def _failed(log_bytes: int) -> GatewayUnreachable:
    """Return an error with the reason that the gateway wrote to its log.  log_bytes: size of the log before the start."""
    with log_path().open("rb") as log:
        log.seek(log_bytes)
        lines = log.read().decode(errors="replace").splitlines(keepends=True)
    reasons = [line.removeprefix(_REASON).strip() for line in lines if line.startswith(_REASON) and line.endswith("\n")]
    unknown = _unwritable() or f"it {describe_exit(exit_code(lock_path()))}."
    return GatewayUnreachable(
        code="gateway_failed",
        message=f"The gateway did not start: {reasons[-1] if reasons else unknown}",
        hint=f"The gateway's log is {log_path()}.",
    )


def _unwritable() -> str:
    """Try to write to the state folder. Return the error, or "" if the attempt succeeds.

    The gateway cannot log this error, because its log is in the state folder.
    """
    folder = get_user_paths().state_dir
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"{error.strerror}: {folder}."
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def stop() -> bool:
    """Stop the gateway and wait until it has exited. Return False if no gateway was running."""
    process = find_process()
    if process is None:
        return False
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)  # a suspended gateway handles SIGTERM only after SIGCONT
    deadline = time.monotonic() + _START_SECONDS
    while find_process():
        if time.monotonic() > deadline:
            name = f"PID {process.pid}" if process.pid else "PID unknown"
            end = f"`kill -9 {process.pid}`" if process.pid else f"`fuser -k -KILL {lock_path()}`"
            raise EngineError(
                code="gateway_stuck",
                message=f"The gateway ({name}) is still running {_START_SECONDS:.0f} s after the request to stop.",
                hint=f"Run {end} to kill the gateway; its engines continue to run.",
            )  # fmt: skip
        time.sleep(_POLL_SECONDS)
    return True
