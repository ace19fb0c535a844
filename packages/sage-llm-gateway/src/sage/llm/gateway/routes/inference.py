"""OpenAI-compatible inference, forwarded to the engines."""

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage.common.errors import ConfigError, NotFound
from sage.llm.client.types import DEFAULT_MODEL, EngineKind
from sage.llm.control_plane.routing import Route
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.gate import JSON_BODY, LARGE_BYTES
from sage.llm.gateway.proxy import disconnected, first_of
from sage.llm.gateway.routes.dependencies import Manager
from sage.llm.gateway.schema import MAX_MODEL_CHARS, inference_schema

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
    return {name: _model(name, route) for name, route in names.items()}


def _model(name: str, route: Route) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(route.created_at.timestamp()), "owned_by": "sage"}


async def _forward(request: Request, manager: Manager, kind: EngineKind) -> Response:
    """Route a request by its `model`, waiting if the engine is starting, and forward it under its server's name for it."""
    body = await request.body()
    if not body:
        raise Refusal(400, "invalid_json", "The body is empty.", "Send a JSON object.")
    model = _model_of(request.scope[JSON_BODY])
    wait_seconds = request.app.state.settings.request_wait_seconds
    upstream = await first_of(manager.running(model, kind, wait_seconds), disconnected(request))
    content = request.scope.pop(JSON_BODY)
    if upstream.model_name not in (None, model):
        renamed = {**content, "model": upstream.model_name}
        body = await asyncio.to_thread(_encoded, renamed) if len(body) > LARGE_BYTES else _encoded(renamed)
        del renamed
    del content  # several times as large as the body, and not needed while the engine answers
    answer: Response = await request.app.state.proxy.forward(upstream, model, request, body)
    return answer


def _encoded(content: dict[str, Any]) -> bytes:
    """Return JSON; not by orjson, which refuses integers beyond 64 bits instead of leaving that to the engine."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _model_of(content: Any) -> str:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARS:
        message = f"'model' is required and must be text of 1 to {MAX_MODEL_CHARS} characters."
        hint = f"'{DEFAULT_MODEL}' means the engine that was started last."
        raise ConfigError(code="model_required", message=message, hint=hint, param="model")
    return model
