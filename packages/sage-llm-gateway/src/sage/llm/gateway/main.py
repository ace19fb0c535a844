"""The gateway's process: take the lock and the port, open the database, and answer requests."""

import argparse
import gc
import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI

from sage.common.errors import Conflict, SageError
from sage.common.logs import configure_logging
from sage.common.settings import Settings, load_settings
from sage.llm.gateway.access import check_exposure
from sage.llm.gateway.app import create_app
from sage.llm.gateway.connections import BoundedHttp, connection_limit
from sage.llm.gateway.instance import publish_address, take_lock

logger = logging.getLogger(__name__)
#: Seconds between the request to stop the gateway and the end of streams that are still open.
_SHUTDOWN_SECONDS = 0.5
#: Number of descriptors of the listening socket. libuv accepts one connection per descriptor in each event loop iteration,
#: so more descriptors shorten the wait if many clients connect at the same time.
_LISTENING_DESCRIPTORS = 16


def main() -> int:
    """Run the gateway until SIGTERM or Ctrl-C, and return the exit code. Engines continue to run after the gateway exits.

    If the gateway cannot start, the reason is printed in one line.
    """
    configure_logging()
    try:
        app, listener = _prepare()
    except SageError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
    except Exception as error:
        logger.exception("The gateway cannot start")
        return _fail(f"The gateway cannot start ({type(error).__name__}: {error}).", 1)
    BoundedHttp.limit = connection_limit()
    gc.collect()
    gc.freeze()  # exclude the existing objects (modules, routes) from garbage collection, because they are never freed
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=BoundedHttp, ws="none", log_config=None, access_log=False, proxy_headers=False,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,  # type: ignore[arg-type] # asyncio also accepts fractions
        )
    )  # fmt: skip
    server.run(sockets=[listener, *(listener.dup() for _ in range(1, _LISTENING_DESCRIPTORS))])
    return 0 if server.started else _fail("The gateway exited while starting; its log shows the reason.", 1)


def _fail(reason: str, exit_code: int) -> int:
    print(f"sage gateway: {' '.join(reason.split())}", file=sys.stderr)
    return exit_code


def _prepare() -> tuple[FastAPI, socket.socket]:
    """Return the application and its listening socket.

    The lock and the port are taken before the database is opened, because opening the database can change its schema. A
    standby gateway takes only the port.
    """
    settings, standby = _arguments(load_settings())
    configure_logging(settings.log_level)
    logging.logThreads = logging.logProcesses = False  # the log format shows neither threads nor processes
    check_exposure(settings)
    if not standby:
        take_lock()
    listener = _listen(settings)
    app = create_app(settings, standby=standby)
    if not standby:
        publish_address(settings)
    return app, listener


def _arguments(settings: Settings) -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(prog="python -m sage.llm.gateway", description="The SAGE gateway.")
    parser.add_argument("--host", default=settings.gateway_host, help="address to listen on")
    parser.add_argument("--port", type=int, default=settings.gateway_port, help="port to listen on")
    parser.add_argument(
        "--standby", action="store_true", help="run as a standby: wait until the active gateway fails, then take over"
    )
    arguments = parser.parse_args()
    update = {"gateway_host": arguments.host, "gateway_port": arguments.port}
    return settings.model_copy(update=update), arguments.standby


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.gateway_host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.gateway_host, settings.gateway_port))
        listener.listen()  # until this call, another socket can be bound to the same address
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Conflict(
            code="port_taken",
            message=f"The gateway cannot listen on {settings.gateway_host}:{settings.gateway_port}: {reason}.",
            hint="Choose another address with --host and --port, or with SAGE_GATEWAY_HOST and SAGE_GATEWAY_PORT.",
        ) from error
    return listener
