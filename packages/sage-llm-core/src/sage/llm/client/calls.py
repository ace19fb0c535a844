"""What both clients send and what they make of the answers."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from sage.common import errors
from sage.common.errors import GatewayUnreachable, SageError

_PREFIX = "/v1/management"
_ERRORS_BY_STATUS: dict[int, type[SageError]] = {
    400: errors.ModelError,
    401: errors.Unauthorized,
    404: errors.NotFound,
    409: errors.Conflict,
    502: errors.EngineError,
    503: errors.Overloaded,
}
#: Codes of wrong usage, which a command line tells by exit code 2.
_USAGE_CODES = ("config_invalid", "target_modules_unknown")


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: str
    path: str
    json: dict[str, Any] | None = None
    params: dict[str, Any] = field(default_factory=dict)


def start(request: dict[str, Any]) -> Call:
    """Start an engine."""
    return Call("POST", f"{_PREFIX}/engines/start", json=request)


def list_all() -> Call:
    """List the engines."""
    return Call("GET", f"{_PREFIX}/engines")


def get(engine_id: str) -> Call:
    """Read one engine."""
    return Call("GET", f"{_PREFIX}/engines/{engine_id}")


def stop(engine_id: str, *, force: bool) -> Call:
    """Stop an engine."""
    return Call("DELETE", f"{_PREFIX}/engines/{engine_id}", params={"force": force})


def resume(engine_id: str) -> Call:
    """Resume an engine."""
    return Call("POST", f"{_PREFIX}/engines/{engine_id}/resume")


def remove(engine_id: str) -> Call:
    """Forget an engine."""
    return Call("POST", f"{_PREFIX}/engines/{engine_id}/remove")


def logs(engine_id: str, tail: int) -> Call:
    """Read the end of an engine's log."""
    return Call("GET", f"{_PREFIX}/engines/{engine_id}/logs", params={"tail": tail})


def follow_logs(engine_id: str, tail: int, offset: int | None) -> Call:
    """Stream an engine's log, from its end or from a byte on."""
    where = {"tail": tail} if offset is None else {"offset": offset}
    return Call("GET", f"{_PREFIX}/engines/{engine_id}/logs", params={"follow": True, **where})


def events(engine_id: str, *, follow: bool) -> Call:
    """Read an engine's transitions."""
    return Call("GET", f"{_PREFIX}/engines/{engine_id}/events", params={"follow": follow})


def training_steps(engine_id: str) -> Call:
    """Read the steps of a training run."""
    return Call("GET", f"{_PREFIX}/engines/{engine_id}/training")


def devices() -> Call:
    """Read the devices."""
    return Call("GET", f"{_PREFIX}/gpu")


def health() -> Call:
    """Ask whether the gateway lives."""
    return Call("GET", "/health")


def models() -> Call:
    """List the models that requests can name."""
    return Call("GET", "/v1/models")


def chat(model: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Call:
    """Ask a model for the next message."""
    return Call("POST", "/v1/chat/completions", json={"model": model, "messages": messages, **options})


def piece_of(line: str) -> str:
    """Return the text that one line of a streamed chat adds; raises EngineError where it tells of a failure."""
    if not line.startswith("data: {"):
        return ""
    content = json.loads(line.removeprefix("data: "))
    if error := content.get("error"):
        raise errors.EngineError(code=error["code"], message=error["message"])
    choices = content["choices"]
    return str(choices[0]["delta"].get("content") or "") if choices else ""


def raise_for_error(response: httpx.Response) -> None:
    """Raise the SageError that an answer tells of, if it does. The body must have been read."""
    if response.is_success:
        return
    try:
        told = response.json()["error"]
        code, message, param = told.get("code") or "unknown", told["message"], told.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message, param = "unknown", f"The gateway answered {response.status_code}.", None
    kind = _ERRORS_BY_STATUS.get(response.status_code, SageError)
    if code in _USAGE_CODES:
        kind = errors.ConfigError
    raise kind(code=code, message=message, param=param)


def unreachable(base_url: str, error: httpx.HTTPError) -> GatewayUnreachable:
    """Return the error for a gateway that does not answer."""
    return GatewayUnreachable(
        code="gateway_unreachable",
        message=f"The gateway at {base_url} does not answer ({type(error).__name__}).",
        hint="`sage gateway start` starts it; `sage gateway status` says where it is.",
    )
