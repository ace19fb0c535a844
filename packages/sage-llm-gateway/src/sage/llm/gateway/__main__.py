"""`python -m sage.llm.gateway`: run the gateway in the foreground."""

import argparse
import json
import os
import socket
import sys

import uvicorn

from sage.common.errors import Conflict, SageError
from sage.common.logs import configure_logging
from sage.common.paths import get_user_paths
from sage.common.processes import LOCK_FD_VARIABLE, holder, try_lock, write_identity
from sage.common.settings import Settings, load_settings
from sage.llm.gateway.app import create_app

#: Streams that nobody ends are cut after this.
_SHUTDOWN_SECONDS = 2


def main() -> int:
    """Run until SIGTERM or Ctrl-C; engines live on."""
    try:
        settings = _arguments(load_settings())
        configure_logging(settings.log_level)
        app = create_app(settings)
        _take_lock()
        listener = _listen(settings)
    except SageError as error:
        print(f"sage gateway: {error}", file=sys.stderr)
        return error.exit_code
    _tell_clients(settings)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    )
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _arguments(settings: Settings) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m sage.llm.gateway", description="The SAGE gateway.")
    parser.add_argument("--host", default=settings.gateway_host, help="address to listen on")
    parser.add_argument("--port", type=int, default=settings.gateway_port, help="port to listen on")
    arguments = parser.parse_args()
    return settings.model_copy(update={"gateway_host": arguments.host, "gateway_port": arguments.port})


def _take_lock() -> None:
    """Hold this user's gateway lock. Raises Conflict where a gateway runs already."""
    if LOCK_FD_VARIABLE in os.environ:  # inherited, and already held
        return
    path = get_user_paths().state_dir / "gateway.lock"
    descriptor = try_lock(path)
    if descriptor is None:
        process = holder(path)
        raise Conflict(
            code="gateway_running",
            message=f"A gateway runs already (PID {process.pid if process else 'unknown'}).",
            hint="`sage gateway status` shows it, `sage gateway stop` ends it.",
        )
    write_identity(descriptor)


def _tell_clients(settings: Settings) -> None:
    """Leave the address and the key where only this user can read them, for the command line."""
    path = get_user_paths().state_dir / "gateway.json"
    path.unlink(missing_ok=True)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"pid": os.getpid(), "url": settings.gateway_url, "api_key": key}, file)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.gateway_host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.gateway_host, settings.gateway_port))
    except OSError as error:
        raise Conflict(
            code="port_taken",
            message=f"The gateway cannot listen on {settings.gateway_host}:{settings.gateway_port}: {error.strerror}.",
            hint="Another program has the port: give another one with --port or SAGE_GATEWAY_PORT.",
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
