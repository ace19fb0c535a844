"""The HTTP interface of model routes. A model route is a name that requests use as `model` and that selects an engine."""

from typing import Any

from fastapi import APIRouter

from sage.llm.client.types import RouteRequest, RouteView
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter(prefix="/v1/management/routes")


@router.get("")
async def list_routes(manager: Manager) -> dict[str, Any]:
    """Return all routes, sorted by name."""
    return {"object": "list", "data": manager.list_routes()}


@router.get("/{name:path}")
async def get_route(name: str, manager: Manager) -> RouteView:
    """Return one route."""
    return manager.get_route(name)


@router.put("/{name:path}")
async def set_route(name: str, request: RouteRequest, manager: Manager) -> RouteView:
    """Create or replace a route; requests in progress are not affected."""
    return await manager.set_route(name, request)


@router.delete("/{name:path}")
async def remove_route(name: str, manager: Manager) -> dict[str, Any]:
    """Delete a route; the engines are not changed."""
    await manager.remove_route(name)
    return {"name": name, "object": "route", "deleted": True}
