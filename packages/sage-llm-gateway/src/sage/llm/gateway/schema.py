"""Parts of the OpenAPI document that the routes' types do not define: schemas of inference requests and of errors."""

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
            "required": ["message", "type", "param", "code", "hint"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "hint": {"type": "string"},
            },
        }
    },
}
#: Errors that every route can return.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _ERROR}}}
    for status, description in (
        (400, "The request is invalid; `param` names the field."),
        (401, "The API key is missing or wrong."),
        (403, "The request comes from a web page of another site."),
        (404, "The engine, model or route does not exist."),
        (405, "The route does not support this method."),
        (408, "The body did not arrive in time."),
        (409, "The engine's state does not allow the request."),
        (413, "The body is larger than the setting max_request_mb."),
        (415, "The body is not application/json."),
        (429, "The engine has too many requests in progress."),
        (431, "The headers are too large."),
        (500, "The disk, the database or the gateway failed."),
        (502, "The engine exited before its answer was complete."),
        (503, "The engine is starting or does not respond, the gateway is a standby, or there are too many requests."),
    )
}


def _number(minimum: float, maximum: float, kind: str = "number") -> dict[str, Any]:
    return {"type": [kind, "null"], "minimum": minimum, "maximum": maximum}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


_INT64 = 2**63
_FLAG = {"type": ["boolean", "null"]}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ANY_OBJECT = {"type": ["object", "null"]}
_STOP = {"type": "string", "minLength": 1, "maxLength": 1024}
_IDS = _list({"type": "integer", "minimum": 0}, minItems=1)
_SEVERAL = {"minItems": 1, "maxItems": 2048}
_INPUT = {"anyOf": [_TEXT, _list(_TEXT, **_SEVERAL), _IDS, _list(_IDS, **_SEVERAL)]}
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
_MODEL = {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_CHARS}
_SAMPLING: dict[str, Any] = {
    "model": _MODEL,
    "max_tokens": _number(1, _INT64, "integer"),
    "max_completion_tokens": _number(1, _INT64, "integer"),
    "temperature": _number(0, 2),
    "top_p": {**_number(0, 1), "exclusiveMinimum": 0},
    "top_k": _number(-1, _INT64 - 1, "integer"),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": {**_ANY_OBJECT, "patternProperties": {"^[0-9]{1,9}$": _BIAS}, "additionalProperties": False},
    "seed": _number(-_INT64, _INT64 - 1, "integer"),
    "stop": {"anyOf": [{"type": "null"}, _STOP, _list(_STOP, maxItems=4)]},
    "n": _number(1, 128, "integer"),
    "stream": _FLAG,
    "stream_options": {
        "anyOf": [{"type": "null"}, _object([], include_usage=_FLAG, include_obfuscation={"enum": [False, None]})]
    },
    "user": _TEXT_OR_NULL,
}
_PARTS = _list(_object(["type", "text"], type={"const": "text"}, text=_TEXT))
_CALLED = _object(["name", "arguments"], name=_TEXT, arguments={"type": ["string", "object"]})
_CALL = _object(["function"], id=_TEXT_OR_NULL, type={"enum": ["function", None]}, function=_CALLED)
_MESSAGE = _object(
    ["role"],
    role={"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
    content={"anyOf": [{"type": "null"}, _TEXT, _PARTS]},
    name=_TEXT_OR_NULL,
    tool_calls={"anyOf": [{"type": "null"}, _list(_CALL)]},
    tool_call_id=_TEXT_OR_NULL,
    reasoning_content=_TEXT_OR_NULL,
    annotations=_list({}, maxItems=0),
)
_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_FUNCTION = _object(["name"], name=_NAME, description=_TEXT_OR_NULL, parameters=_ANY_OBJECT, strict=_FLAG)
_TOOL = _object(["type", "function"], type={"const": "function"}, function=_FUNCTION)
_CHOSEN = _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=_NAME))
_SCHEMA = _object(["name", "schema"], name=_NAME, description=_TEXT_OR_NULL, schema={"type": "object"}, strict=_FLAG)
_FORMATS = [
    {"type": "null"},
    _object(["type"], type={"enum": ["text", "json_object"]}),
    _object(["type", "json_schema"], type={"const": "json_schema"}, json_schema=_SCHEMA),
]
_BODIES = {
    "ChatRequest": _object(
        ["model", "messages"],
        **_SAMPLING,
        messages=_list(_MESSAGE, minItems=1),
        logprobs=_FLAG,
        top_logprobs=_number(0, 20, "integer"),
        tools={"anyOf": [{"type": "null"}, _list(_TOOL)]},
        tool_choice={"anyOf": [{"enum": ["auto", "none", "required", None]}, _CHOSEN]},
        parallel_tool_calls=_FLAG,
        response_format={"anyOf": _FORMATS},
        modalities={"anyOf": [{"type": "null"}, _list({"const": "text"})]},
        metadata=_ANY_OBJECT,
        store={"enum": [False, None]},
        service_tier=_TEXT_OR_NULL,
        safety_identifier=_TEXT_OR_NULL,
        prompt_cache_key=_TEXT_OR_NULL,
    ),
    "CompletionRequest": _object(
        ["model", "prompt"],
        **{**_SAMPLING, "max_tokens": _number(0, _INT64, "integer")},
        prompt=_INPUT,
        echo=_FLAG,
        logprobs=_number(0, 20, "integer"),
        best_of=_number(1, 128, "integer"),
        suffix={"enum": ["", None]},
    ),
    "EmbeddingRequest": _object(
        ["model", "input"],
        model=_MODEL,
        input=_INPUT,
        encoding_format={"enum": ["float", "base64", None]},
        dimensions=_number(1, _INT64, "integer"),
        user=_TEXT_OR_NULL,
    ),
}


def inference_schema(body: str) -> dict[str, Any]:
    """Return keyword arguments for the decorator of an inference route. They describe the request and the answer.

    body: key of `_BODIES`.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if body != "EmbeddingRequest":
        content["text/event-stream"] = {"schema": {"type": "string"}}
    request = {"required": True, "content": {"application/json": {"schema": _BODIES[body]}}}
    return {
        "openapi_extra": {"requestBody": request},
        "responses": {200: {"description": "The answer in OpenAI's format.", "content": content}},
    }


def install(app: FastAPI) -> None:
    """Remove status 422 from an application's OpenAPI document, because no route returns this status."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            content = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in content["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = content
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
