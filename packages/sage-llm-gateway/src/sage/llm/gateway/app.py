"""The application: routes over one ControlPlaneManager."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway import errors, schema
from sage.llm.gateway.access import check_exposure
from sage.llm.gateway.gate import Gate
from sage.llm.gateway.instance import follow_role
from sage.llm.gateway.proxy import EngineProxy
from sage.llm.gateway.routes import health, inference, management


def create_app(settings: Settings, *, standby: bool = False) -> FastAPI:
    """Return the gateway, its database opened.

    standby: another gateway of the same state folder is expected to be the active one.
    Raises ConfigError if the settings would open it to everyone, or if the database cannot be used.
    """
    check_exposure(settings)
    manager = ControlPlaneManager(settings, standby=standby)
    proxy = EngineProxy(manager, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await manager.open()
        following = asyncio.create_task(follow_role(manager, settings, standby=standby))
        yield
        following.cancel()
        await manager.close()
        proxy.close()

    app = FastAPI(title="SAGE gateway", lifespan=lifespan, redirect_slashes=False, responses=schema.ERROR_RESPONSES)
    app.state.settings, app.state.manager = settings, manager
    errors.install(app)
    schema.install(app)
    for router in (management.router, inference.router, health.router):
        app.include_router(router)
    app.add_middleware(Gate, settings=settings, proxy=proxy)
    return app
