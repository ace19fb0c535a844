"""Create the gateway's ASGI application, whose HTTP routes call a ControlPlaneManager."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway import errors, schema
from sage.llm.gateway.access import check_exposure
from sage.llm.gateway.gate import Gate
from sage.llm.gateway.instance import follow_role
from sage.llm.gateway.proxy import is_inference
from sage.llm.gateway.routes import health, inference, management, model_routes, training_runs, webhooks
from sage.llm.gateway.tracing import traced_proxy


class Gateway(FastAPI):
    """The gateway's ASGI application."""

    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; an inference request skips the framework's middleware and routing."""
        if scope["type"] == "http" and is_inference(scope):
            await self.gate(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, *, standby: bool = False) -> Gateway:
    """Open the state folder and the database, and return the gateway's application.

    standby: True if another gateway of the same state folder is expected to be active.
    Raises ConfigError if the settings allow network access without an API key.
    Raises ConfigError if the state folder or the database cannot be used.
    """
    check_exposure(settings)
    manager = ControlPlaneManager(settings, standby=standby)
    proxy = traced_proxy(manager, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await manager.open()
        following = asyncio.create_task(follow_role(manager, settings, standby=standby))
        yield
        following.cancel()
        await manager.close()
        proxy.close()

    app = Gateway(title="SAGE gateway", lifespan=lifespan, redirect_slashes=False, responses=schema.ERROR_RESPONSES)
    app.state.settings, app.state.manager = settings, manager
    errors.install(app)
    schema.install(app)
    routers = (management, training_runs, model_routes, webhooks, inference, health)
    for router in (module.router for module in routers):
        app.include_router(router)
    app.gate = Gate(settings, proxy)
    app.add_middleware(app.gate.in_front_of)
    return app
