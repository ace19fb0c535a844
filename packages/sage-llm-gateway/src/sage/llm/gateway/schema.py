"""What the OpenAPI document says beyond what the routes' types say: bodies of inference requests, and errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

MAX_MODEL_CHARS = 512
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
#: Errors that every route can answer with.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _ERROR}}}
    for status, description in (
        (400, "The request is wrong; `param` names the field."),
        (401, "The API key is missing or wrong."),
        (403, "The request comes from a web page of another site."),
        (404, "There is no such engine, model or route."),
        (405, "The route does not know this method."),
        (408, "The body did not arrive in time."),
        (409, "The engine is not in a state that allows this."),
        (413, "The body is larger than the setting max_request_mb."),
        (415, "The body is not application/json."),
        (431, "The headers are too large."),
        (500, "The disk, the database or the gateway failed."),
        (502, "The engine died before its answer was complete."),
        (503, "Not now: the engine is starting or hangs, or there are too many requests. Retry-After says when."),
    )
}


def _number(minimum: float, maximum: float, kind: str = "number") -> dict[str, Any]:
    return {"type": [kind, "null"], "minimum": minimum, "maximum": maximum}


_FLAG = {"type": ["boolean", "null"]}
_STOP = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}
_SAMPLING: dict[str, Any] = {
    "model": {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_CHARS},
    "max_tokens": _number(1, 2**31, "integer"),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "seed": _number(-(2**63), 2**63 - 1, "integer"),
    "stop": _STOP,
    "n": _number(1, 128, "integer"),
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "user": {"type": ["string", "null"]},
}
_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "null"}, {"type": "string"}, _PARTS]},
        "name": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
    },
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_INPUT = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


_BODIES = {
    "ChatRequest": _object(
        ["model", "messages"],
        **_SAMPLING,
        max_completion_tokens=_number(1, 2**31, "integer"),
        messages={"type": "array", "items": _MESSAGE, "minItems": 1},
        tools={"type": ["array", "null"], "items": {"type": "object"}},
        tool_choice={"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "object"}]},
        response_format={"type": ["object", "null"]},
        logprobs=_FLAG,
        top_logprobs=_number(0, 20, "integer"),
    ),
    "CompletionRequest": _object(
        ["model", "prompt"], **_SAMPLING, prompt=_INPUT, echo=_FLAG, logprobs=_number(0, 20, "integer")
    ),
    "EmbeddingRequest": _object(
        ["model", "input"],
        model=_SAMPLING["model"],
        input=_INPUT,
        encoding_format={"enum": ["float", "base64", None]},
        dimensions=_number(1, 2**31, "integer"),
        user=_SAMPLING["user"],
    ),
}


def inference_schema(body: str) -> dict[str, Any]:
    """Return the decorator's arguments that document a route which passes its body on to an engine."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if body != "EmbeddingRequest":
        content["text/event-stream"] = {"schema": {"type": "string"}}
    request = {"required": True, "content": {"application/json": {"schema": _BODIES[body]}}}
    return {
        "openapi_extra": {"requestBody": request},
        "responses": {200: {"description": "OpenAI's answer.", "content": content}},
    }


def install(app: FastAPI) -> None:
    """Make the document of an application leave out 422, which it never answers."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            content = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in content["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = content
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
