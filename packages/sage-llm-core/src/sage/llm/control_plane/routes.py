"""Manage routes. A route is a model name that refers to one or more engines."""

from collections.abc import Callable
from typing import Any

from sage.common.errors import ConfigError
from sage.llm.client.types import (
    EngineKind,
    EngineState,
    RouteRequest,
    RouteTarget,
    RouteTargetView,
    RouteView,
    check_route_name,
)
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import Route, RoutingTable
from sage.llm.control_plane.store.routes import RouteRecord, route_not_found
from sage.llm.control_plane.store.store import Store

_INFERENCE = (EngineKind.LLM, EngineKind.EMBEDDING)


class Routes:
    """Base class of ControlPlaneManager with the methods for routes. ControlPlaneManager sets the attributes."""

    _store: Store
    _pool: Pool
    _routing: RoutingTable
    _write: Callable[..., Any]

    async def set_route(self, name: str, request: RouteRequest) -> RouteView:
        """Create or replace a route, even if its engines do not exist yet. Raises ConfigError if the name is not allowed."""
        try:
            check_route_name(name)
        except ValueError as error:
            raise ConfigError(
                code="config_invalid", message=f"The route name is not allowed: it {error}.", param="name"
            ) from error
        await self._write(self._store.set_route, name, request.engines, request.fallback, actor="user")
        await self._routing.load_named_routes(self._store)
        return self.get_route(name)

    async def remove_route(self, name: str) -> None:
        """Delete a route. Raises NotFound."""
        self.get_route(name)  # raises NotFound also if the name contains NUL, which the database rejects
        await self._write(self._store.remove_route, name, actor="user")
        await self._routing.load_named_routes(self._store)

    def list_routes(self) -> list[RouteView]:
        """Return all routes."""
        return [self._route_view(route) for route in self._routing.named_routes()]

    def get_route(self, name: str) -> RouteView:
        """Return a route. Raises NotFound."""
        for route in self._routing.named_routes():
            if route.name == name:
                return self._route_view(route)
        raise route_not_found(name)

    def served(self) -> list[Route]:
        """Return the running inference engines."""
        return [route for kind in _INFERENCE for route in self._routing.routes(kind) if route.state is EngineState.RUNNING]

    def served_routes(self) -> dict[str, Route]:
        """Return one running engine of each route, by route name. Routes without a running engine are omitted."""
        found: dict[str, Route] = {}
        for route in self._routing.named_routes():
            names = [*(target.engine for target in route.engines), route.fallback or ""]
            engines = [engine for name in names if (engine := self._newest(name))]
            if running := [engine for engine in engines if engine.state is EngineState.RUNNING]:
                found[route.name] = running[0]
        return found

    def _route_view(self, route: RouteRecord) -> RouteView:
        engines = [self._target_view(target) for target in route.engines]
        return RouteView(name=route.name, engines=engines, fallback=route.fallback, updated_at=route.updated_at)

    def _target_view(self, target: RouteTarget) -> RouteTargetView:
        engine = self._newest(target.engine)
        found = {"engine_id": engine.engine_id, "state": engine.state} if engine else {}
        return RouteTargetView(engine=target.engine, weight=target.weight, **found)

    def _newest(self, name: str) -> Route | None:
        return next((engine for kind in _INFERENCE if (engine := self._routing.newest(name, kind))), None)
