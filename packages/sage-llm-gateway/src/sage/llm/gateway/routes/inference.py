"""OpenAI-compatible inference, forwarded to the engines."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage.common.errors import NotFound
from sage.llm.client.types import DEFAULT_MODEL, EngineKind
from sage.llm.control_plane.routing import Route
from sage.llm.gateway.gate import JSON_BODY, requested_model
from sage.llm.gateway.proxy import disconnected, first_of
from sage.llm.gateway.routes.dependencies import Manager
from sage.llm.gateway.schema import inference_schema

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", **inference_schema("ChatRequest"))
async def chat_completions(request: Request, manager: Manager) -> Response:
    """Answer a chat."""
    return await _forward(request, manager, EngineKind.LLM)


@router.post("/completions", **inference_schema("CompletionRequest"))
async def completions(request: Request, manager: Manager) -> Response:
    """Complete a text."""
    return await _forward(request, manager, EngineKind.LLM)


@router.post("/embeddings", **inference_schema("EmbeddingRequest"))
async def embeddings(request: Request, manager: Manager) -> Response:
    """Turn texts into vectors."""
    return await _forward(request, manager, EngineKind.EMBEDDING)


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


async def _forward(request: Request, manager: Manager, kind: EngineKind) -> Response:
    """Forward a request to the engine that its `model` names, waiting if the engine is starting."""
    model = requested_model(request.scope)
    wait_seconds = request.app.state.settings.request_wait_seconds
    await request.body()  # so that `disconnected` waits for what follows the body
    client = _client(request.scope[JSON_BODY], request.headers)
    upstream = await first_of(manager.running(model, kind, wait_seconds, client), disconnected(request))
    answer: Response = await request.app.state.proxy.forward(upstream, model, request)
    return answer


def _client(body: dict[str, Any], headers: Mapping[str, str]) -> str | None:
    """Return who sent a request, for routes that split requests: its field `user`, else its key; None if it has neither."""
    user = body.get("user")
    if isinstance(user, str) and user:
        return f"user {user}"
    return headers.get("authorization")
