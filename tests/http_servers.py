"""Run an HTTP server of a test in the test's event loop."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from support import free_port


@contextlib.asynccontextmanager
async def listening(app: web.Application, port: int | None = None, **options: Any) -> AsyncIterator[int]:
    """Run a server on a port, by default a free one, and yield the port.  options: keyword arguments of `web.AppRunner`."""
    port = port or free_port()
    runner = web.AppRunner(app, **options)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield port
    finally:
        await runner.cleanup()
