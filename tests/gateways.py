"""Run a gateway and engines in the test's process, with real HTTP on loopback. The engines load no model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import uvicorn
from aiohttp import web
from http_servers import listening
from support import free_port

from sage.common.settings import load_settings
from sage.llm.control_plane.routing import Upstream
from sage.llm.gateway.app import create_app
from sage.llm.gateway.connections import BoundedHttp

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


async def healthy(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


@contextlib.asynccontextmanager
async def engine(answer: Handler, health: Handler = healthy, keep_alive_seconds: float = 75) -> AsyncIterator[int]:
    """Run an engine whose inference routes call `answer`, and yield its port."""
    app = web.Application(client_max_size=2**24)
    app.router.add_get("/health", health)
    app.router.add_post("/v1/{route:.*}", answer)
    options = {"keepalive_timeout": keep_alive_seconds, "shutdown_timeout": 0.1, "handler_cancellation": True}
    async with listening(app, **options) as port:
        yield port


@contextlib.asynccontextmanager
async def gateway(
    engine_port: int | None = None,
    is_responsive: Callable[[], bool] = lambda: True,
    model_name: str | None = None,
    key: str = "",
    parameters: frozenset[str] | None = None,
    standby: bool = False,
    **settings: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a gateway and yield an HTTP client for it. If `engine_port` is given, the gateway has one engine named `tiny`.

    model_name: model name at the engine's server.  key: API key of the server.  parameters: request fields that the server
    supports.
    """
    port = free_port()
    app = create_app(load_settings().model_copy(update={"gateway_port": port, **settings}), standby=standby)
    if engine_port:

        async def running(*_: object) -> Upstream:
            return Upstream(f"127.0.0.1:{engine_port}", model_name, "engine-a", "tiny", key, parameters)

        app.state.manager.running = running
        app.state.manager.is_responsive = lambda _: is_responsive()
    server = uvicorn.Server(uvicorn.Config(
        app, port=port, http=BoundedHttp, ws="none", log_config=None, access_log=False, proxy_headers=False,
        timeout_graceful_shutdown=1,
    ))  # fmt: skip
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client
    finally:
        server.should_exit = True
        await serving


async def until(is_true: Callable[[], bool], what: str) -> None:
    """Wait until `is_true` returns true. Fails after 20 seconds; what: the expected condition, for the error."""
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.01)
    assert is_true(), what
