"""OpenAI-compatible inference, passed on to the engines."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage.common.errors import ConfigError, NotFound
from sage.llm.client.types import DEFAULT_MODEL, EngineKind, EngineState, EngineView
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.gate import JSON_BODY
from sage.llm.gateway.routes.dependencies import Manager
from sage.llm.gateway.routing import running_engine
from sage.llm.gateway.schema import MAX_MODEL_CHARS, inference_schema

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", **inference_schema("ChatRequest"))
async def chat_completions(request: Request, manager: Manager) -> Response:
    """Answer a chat."""
    return await _pass_on(request, manager, EngineKind.LLM)


@router.post("/completions", **inference_schema("CompletionRequest"))
async def completions(request: Request, manager: Manager) -> Response:
    """Complete a text."""
    return await _pass_on(request, manager, EngineKind.LLM)


@router.post("/embeddings", **inference_schema("EmbeddingRequest"))
async def embeddings(request: Request, manager: Manager) -> Response:
    """Turn texts into vectors."""
    return await _pass_on(request, manager, EngineKind.EMBEDDING)


@router.get("/models")
async def models(manager: Manager) -> dict[str, Any]:
    """Return the models that are being served."""
    return {"object": "list", "data": await _served(manager)}


@router.get("/models/{model:path}")
async def model(model: str, manager: Manager) -> dict[str, Any]:
    """Return one model that is being served."""
    for served in await _served(manager):
        if served["id"] == model:
            return served
    raise NotFound(code="model_not_found", message=f"The model '{model}' is not being served.", param="model")


async def _served(manager: Manager) -> list[dict[str, Any]]:
    engines = [
        engine
        for engine in await manager.list_engines()
        if engine.kind is not EngineKind.FINETUNE and engine.state is EngineState.RUNNING
    ]
    names = {engine.name: engine for engine in engines}
    llms = [engine for engine in engines if engine.kind is EngineKind.LLM]
    if llms:
        names[DEFAULT_MODEL] = max(llms, key=lambda engine: engine.state_at)
    return [_model(name, engine) for name, engine in names.items()]


def _model(name: str, engine: EngineView) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(engine.created_at.timestamp()), "owned_by": "sage"}


async def _pass_on(request: Request, manager: Manager, kind: EngineKind) -> Response:
    body = await request.body()
    if not body:
        raise Refusal(400, "invalid_json", "The body is empty.", "Send a JSON object.")
    model = _model_of(request.scope.pop(JSON_BODY))
    engine = await running_engine(manager, model, kind, request)
    answer: Response = await request.app.state.proxy.forward(engine, request, body)
    return answer


def _model_of(content: Any) -> str:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARS:
        message = f"'model' is required and must be text of 1 to {MAX_MODEL_CHARS} characters."
        hint = f"'{DEFAULT_MODEL}' means the engine that was started last."
        raise ConfigError(code="model_required", message=message, hint=hint, param="model")
    return model
