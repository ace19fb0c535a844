"""OpenAI-compatible inference. The POST routes are documented here, and answered by the proxy."""

from typing import Any

from fastapi import APIRouter

from sage.common.errors import NotFound
from sage.llm.client.types import DEFAULT_MODEL, EngineKind
from sage.llm.control_plane.routing import Route
from sage.llm.gateway.routes.dependencies import Manager
from sage.llm.gateway.schema import inference_schema

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", **inference_schema("ChatRequest"))
def chat_completions() -> None:
    """Return the next message of a chat."""


@router.post("/completions", **inference_schema("CompletionRequest"))
def completions() -> None:
    """Complete a text."""


@router.post("/embeddings", **inference_schema("EmbeddingRequest"))
def embeddings() -> None:
    """Return the embedding vectors of texts."""


@router.get("/models")
async def models(manager: Manager) -> dict[str, Any]:
    """Return the models that are being served."""
    return {"object": "list", "data": list(_served(manager).values())}


@router.get("/models/{model:path}")
async def model(model: str, manager: Manager) -> dict[str, Any]:
    """Return one model that is being served."""
    if served := _served(manager).get(model):
        return served
    raise NotFound(code="model_not_found", message=f"The model '{model}' is not being served.", param="model")


def _served(manager: Manager) -> dict[str, dict[str, Any]]:
    routes = manager.served()
    names = {route.name: route for route in sorted(routes, key=lambda route: route.first_event)}
    if llms := [route for route in routes if route.kind is EngineKind.LLM]:
        names[DEFAULT_MODEL] = max(llms, key=lambda route: route.last_event)
    names |= manager.served_routes()
    return {name: _model(name, route) for name, route in names.items()}


def _model(name: str, route: Route) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(route.created_at.timestamp()), "owned_by": "sage"}
