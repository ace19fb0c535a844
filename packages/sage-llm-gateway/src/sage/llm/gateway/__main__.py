"""`python -m sage.llm.gateway`: run the gateway in the foreground."""

import argparse
import json
import logging
import os
import socket
import sys

import uvicorn
from fastapi import FastAPI

from sage.common.errors import Conflict, SageError
from sage.common.logs import configure_logging
from sage.common.paths import get_user_paths
from sage.common.processes import LOCK_FD_VARIABLE, holder, try_lock, write_identity
from sage.common.settings import Settings, load_settings
from sage.llm.gateway.access import check_exposure, key_of
from sage.llm.gateway.app import create_app
from sage.llm.gateway.connections import BoundedHttp, connection_limit

logger = logging.getLogger(__name__)
#: Streams that nobody ends are cut after this.
_SHUTDOWN_SECONDS = 2
#: Longer than clients keep their connections (httpx 5 s, aiohttp 15 s), so that none meets one that was just closed.
_KEEP_ALIVE_SECONDS = 30


def main() -> int:
    """Run until SIGTERM or Ctrl-C; engines live on. The reason why it cannot start is one line on stderr."""
    configure_logging()
    try:
        app, listener = _prepare()
    except SageError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
    except Exception as error:
        logger.exception("The gateway cannot start")
        return _fail(f"It cannot start ({type(error).__name__}: {error}).", 1)
    BoundedHttp.limit = connection_limit()
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=BoundedHttp, ws="none", log_config=None, access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )  # fmt: skip
    server.run(sockets=[listener])
    return 0 if server.started else _fail("It ended while starting; its log says why.", 1)


def _fail(reason: str, exit_code: int) -> int:
    print(f"sage gateway: {' '.join(reason.split())}", file=sys.stderr)
    return exit_code


def _prepare() -> tuple[FastAPI, socket.socket]:
    """Take what the gateway needs, the database last: only the one that has the lock and the port may change it."""
    settings = _arguments(load_settings())
    configure_logging(settings.log_level)
    check_exposure(settings)
    _take_lock()
    listener = _listen(settings)
    app = create_app(settings)
    _tell_clients(settings)
    return app, listener


def _arguments(settings: Settings) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m sage.llm.gateway", description="The SAGE gateway.")
    parser.add_argument("--host", default=settings.gateway_host, help="address to listen on")
    parser.add_argument("--port", type=int, default=settings.gateway_port, help="port to listen on")
    arguments = parser.parse_args()
    return settings.model_copy(update={"gateway_host": arguments.host, "gateway_port": arguments.port})


def _take_lock() -> None:
    """Hold this user's gateway lock. Raises Conflict if a gateway runs already."""
    if LOCK_FD_VARIABLE in os.environ:  # inherited, and already held
        return
    path = get_user_paths().state_dir / "gateway.lock"
    descriptor = try_lock(path)
    if descriptor is None:
        process = holder(path)
        raise Conflict(
            code="gateway_running",
            message=f"A gateway runs already (PID {process.pid if process and process.pid else 'unknown'}).",
            hint="`sage gateway status` shows it, `sage gateway stop` ends it.",
        )
    write_identity(descriptor)


def _tell_clients(settings: Settings) -> None:
    """Leave the address and the key where only this user can read them, for the command line."""
    path = get_user_paths().state_dir / "gateway.json"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"pid": os.getpid(), "url": settings.gateway_url, "api_key": key_of(settings)}, file)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.gateway_host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.gateway_host, settings.gateway_port))
        listener.listen()  # two that are bound alike are told apart here only
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Conflict(
            code="port_taken",
            message=f"The gateway cannot listen on {settings.gateway_host}:{settings.gateway_port}: {reason}.",
            hint="Choose another address with --host and --port, or with SAGE_GATEWAY_HOST and SAGE_GATEWAY_PORT.",
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
