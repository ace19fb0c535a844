"""The application: routes over one ControlPlaneManager."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway import errors
from sage.llm.gateway.auth import LOOPBACK, ApiKeyMiddleware, check_exposure
from sage.llm.gateway.proxy import EngineProxy
from sage.llm.gateway.routes import health, inference, management


def create_app(settings: Settings) -> FastAPI:
    """Return the gateway. Raises ConfigError where the settings would open it to everyone."""
    check_exposure(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.manager = manager = ControlPlaneManager(settings)
        app.state.proxy = proxy = EngineProxy()
        await manager.open()
        yield
        await manager.close()
        await proxy.close()

    app = FastAPI(title="SAGE gateway", lifespan=lifespan)
    errors.install(app)
    for router in (management.router, inference.router, health.router):
        app.include_router(router)
    if settings.api_key:
        app.add_middleware(ApiKeyMiddleware, key=settings.api_key.get_secret_value())
    else:  # a page in the user's browser must not reach it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return app
