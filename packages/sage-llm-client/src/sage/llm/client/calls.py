"""What both clients send and what they make of the answers."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from sage.common import errors
from sage.common.errors import ConfigError, EngineError, GatewayUnreachable, SageError

#: A start or resume may hash large files first; giving up earlier would invite a second start.
_LONG_SECONDS = 3600.0
_PREFIX = "/v1/management"
_ID = re.compile(r"[\w-]+", re.ASCII)
_ERRORS_BY_STATUS: dict[int, type[SageError]] = {
    400: errors.ModelError,
    401: errors.Unauthorized,
    404: errors.NotFound,
    409: errors.Conflict,
    502: EngineError,
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
    timeout_seconds: float | None = None  #: None: the client's own


def headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request. Raises ConfigError if the key cannot travel in one."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError(code="api_key_invalid", message="The API key has characters other than printable ASCII.")
    return {"Authorization": f"Bearer {api_key}"}


def _of(engine_id: str, route: str = "") -> str:
    """Return a path of an engine. Raises NotFound for what cannot be an id, and could lead elsewhere."""
    if not _ID.fullmatch(engine_id):
        raise errors.NotFound(
            code="engine_not_found", message=f"No engine '{engine_id[:100]}'.", param="engine_id",
            hint="`sage llm engine list` shows all engines.",
        )  # fmt: skip
    return f"{_PREFIX}/engines/{engine_id}{route}"


def start(request: dict[str, Any]) -> Call:
    """Start an engine."""
    return Call("POST", f"{_PREFIX}/engines/start", json=request, timeout_seconds=_LONG_SECONDS)


def list_all() -> Call:
    """List the engines."""
    return Call("GET", f"{_PREFIX}/engines")


def get(engine_id: str) -> Call:
    """Read one engine."""
    return Call("GET", _of(engine_id))


def stop(engine_id: str, *, force: bool) -> Call:
    """Stop an engine."""
    return Call("DELETE", _of(engine_id), params={"force": force})


def resume(engine_id: str) -> Call:
    """Resume an engine."""
    return Call("POST", _of(engine_id, "/resume"), timeout_seconds=_LONG_SECONDS)


def remove(engine_id: str) -> Call:
    """Forget an engine."""
    return Call("POST", _of(engine_id, "/remove"), timeout_seconds=_LONG_SECONDS)


def logs(engine_id: str, tail: int) -> Call:
    """Read the end of an engine's log."""
    return Call("GET", _of(engine_id, "/logs"), params={"tail": tail})


def follow_logs(engine_id: str, tail: int, offset: int | None) -> Call:
    """Stream an engine's log, from its end or from a byte on."""
    where = {"tail": tail} if offset is None else {"offset": offset}
    return Call("GET", _of(engine_id, "/logs"), params={"follow": True, **where})


def events(engine_id: str, *, follow: bool) -> Call:
    """Read an engine's transitions."""
    return Call("GET", _of(engine_id, "/events"), params={"follow": follow})


def training_steps(engine_id: str) -> Call:
    """Read the steps of a training run."""
    return Call("GET", _of(engine_id, "/training"))


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


class ChatStream:
    """Reads the lines of a streamed chat."""

    def __init__(self) -> None:
        self._is_done = False

    def piece(self, line: str) -> str:
        """Return the text that a line adds; raises EngineError if it reports a failure."""
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data.startswith("{"):
            self._is_done |= data == "[DONE]"
            return ""
        content = _parsed(data)
        if error := content.get("error"):
            raise EngineError(code=error.get("code") or "unknown", message=error["message"])
        choices = content["choices"]
        return str(choices[0]["delta"].get("content") or "") if choices else ""

    def finish(self) -> None:
        """Raise EngineError if the answer was cut."""
        if not self._is_done:
            raise EngineError(
                code="stream_cut",
                message="The answer ended before it was complete.",
                hint="`sage llm engine list` shows whether its engine still runs.",
            )


def content_of(response: httpx.Response) -> Any:
    """Return what an answer says. Raises the SageError that it reports, or GatewayUnreachable if it is not a gateway's."""
    raise_for_error(response)
    return _parsed(response.text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = "What answered is not a SAGE gateway: its answer is not JSON."
        raise GatewayUnreachable(code="not_a_gateway", message=message) from error


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
        kind = ConfigError
    raise kind(code=code, message=message, param=param)


def unreachable(base_url: str, error: httpx.HTTPError) -> GatewayUnreachable:
    """Return the error for a gateway that does not answer."""
    if isinstance(error, httpx.ReadTimeout):
        return GatewayUnreachable(
            code="gateway_slow",
            message=f"The gateway at {base_url} took the request and has not answered in time.",
            hint="It may still carry it out: look at `sage llm engine list` before you try again.",
        )
    return GatewayUnreachable(
        code="gateway_unreachable",
        message=f"The gateway at {base_url} does not answer ({type(error).__name__}).",
        hint="`sage gateway start` starts it; `sage gateway status` says where it is.",
    )
