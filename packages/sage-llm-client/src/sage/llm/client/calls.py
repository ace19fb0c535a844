"""The HTTP requests that SageClient and AsyncSageClient send, and the functions that read the answers."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx

from sage.common.errors import ConfigError, NotFound
from sage.llm.client.answers import as_list, as_model, parse
from sage.llm.client.run_types import TrainingChangeView
from sage.llm.client.types import (
    BackendView,
    Device,
    EngineKind,
    EnginePage,
    EngineState,
    EngineView,
    EstimateView,
    EventPage,
    RouteView,
    TrainingStep,
    WebhookResult,
)

T = TypeVar("T")
Order = Literal["asc", "desc"]
#: A position in the change feed: the id of an event, or "latest" for the id of the newest event.
Cursor = int | Literal["latest"]
#: Time-out of requests that can take long: starts, forks, resumes and removals.
_LONG_SECONDS = 3600.0
#: Number of engines in each page when all engines are listed. The gateway allows at most this number.
PAGE_LIMIT = 1000
_PREFIX = "/v1/management"
_ID = re.compile(r"[\w-]+", re.ASCII)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP request, and the function that reads its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: dict[str, Any] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    timeout_seconds: float | None = None  #: None: the time-out of the client


def headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request. Raises ConfigError if the key cannot be sent in a header."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError(
            code="api_key_invalid", message="The API key has characters that are not printable ASCII characters."
        )
    return {"Authorization": f"Bearer {api_key}"}


def _engine(engine_id: str, route: str = "") -> str:
    """Return the URL path of an engine. Raises NotFound if the id has characters that could change the path."""
    if not _ID.fullmatch(engine_id):
        raise NotFound(
            code="engine_not_found", message=f"No engine '{engine_id[:100]}'.", param="engine_id",
            hint="`sage llm engine list --all` shows all engines.",
        )  # fmt: skip
    return f"{_PREFIX}/engines/{engine_id}{route}"


def start(request: dict[str, Any]) -> Call[EngineView]:
    """Return the call that starts an engine."""
    return Call(
        "POST", f"{_PREFIX}/engines/start", as_model(EngineView), json=request, timeout_seconds=_LONG_SECONDS
    )  # fmt: skip


def page(
    limit: int, after: str | None, states: Collection[EngineState], kinds: Collection[EngineKind], order: Order
) -> Call[EnginePage]:
    """Return the call that lists one page of engines."""
    filters = {"after": after, "state": ",".join(states), "kind": ",".join(kinds)}
    params = {"limit": limit, "order": order, **{name: value for name, value in filters.items() if value}}
    return Call("GET", f"{_PREFIX}/engines", as_model(EnginePage), params=params)


def get(engine_id: str) -> Call[EngineView]:
    """Return the call that reads one engine."""
    return Call("GET", _engine(engine_id), as_model(EngineView))


def stop(engine_id: str, *, force: bool) -> Call[EngineView]:
    """Return the call that stops an engine."""
    return Call("DELETE", _engine(engine_id), as_model(EngineView), params={"force": force})


def pause(engine_id: str) -> Call[EngineView]:
    """Return the call that pauses an engine."""
    return Call("POST", _engine(engine_id, "/pause"), as_model(EngineView))


def queue() -> Call[list[EngineView]]:
    """Return the call that lists the waiting engines."""
    return Call("GET", f"{_PREFIX}/queue", as_list(EngineView))


def move(engine_id: str, position: int) -> Call[EngineView]:
    """Return the call that moves a waiting engine in the queue."""
    return Call("POST", _engine(engine_id, "/move"), as_model(EngineView), json={"position": position})


def resume(engine_id: str) -> Call[EngineView]:
    """Return the call that resumes a stopped, failed or paused engine."""
    return Call("POST", _engine(engine_id, "/resume"), as_model(EngineView), timeout_seconds=_LONG_SECONDS)


def checkpoint(engine_id: str) -> Call[EngineView]:
    """Return the call that saves a checkpoint of a training run."""
    return Call("POST", _engine(engine_id, "/checkpoint"), as_model(EngineView))


def change_training(engine_id: str, options: dict[str, Any]) -> Call[TrainingChangeView]:
    """Return the call that changes options of a training run."""
    return Call("PATCH", _engine(engine_id, "/training"), as_model(TrainingChangeView), json=options)


def fork(engine_id: str, request: dict[str, Any]) -> Call[EngineView]:
    """Return the call that forks a training run."""
    return Call(
        "POST", _engine(engine_id, "/fork"), as_model(EngineView), json=request, timeout_seconds=_LONG_SECONDS
    )  # fmt: skip


def remove(engine_id: str) -> Call[None]:
    """Return the call that deletes a stopped, completed or failed engine."""
    return Call("POST", _engine(engine_id, "/remove"), lambda _: None, timeout_seconds=_LONG_SECONDS)


def logs(engine_id: str, tail: int) -> Call[list[str]]:
    """Return the call that reads the last `tail` lines of an engine's log."""
    return Call("GET", _engine(engine_id, "/logs"), lambda r: r.text.split("\n")[:-1], params={"tail": tail})


def follow_logs(engine_id: str, tail: int, offset: int | None) -> Call[None]:
    """Return the call that streams an engine's log from byte `offset`, or from the last `tail` lines if `offset` is None."""
    begin = {"tail": tail} if offset is None else {"offset": offset}
    return Call("GET", _engine(engine_id, "/logs"), lambda _: None, params={"follow": True, **begin})


def events(engine_id: str, after: int, *, follow: bool) -> Call[None]:
    """Return the call that streams the events of one engine after the event with the id `after`.

    If `follow` is set, new events are also streamed.
    """
    return Call("GET", _engine(engine_id, "/events"), lambda _: None, params={"after": after, "follow": follow})


def changes(after: Cursor, limit: int) -> Call[EventPage]:
    """Return the call that reads one page of the change feed."""
    return Call("GET", f"{_PREFIX}/events", as_model(EventPage), params={"after": after, "limit": limit})


def follow_changes(after: int) -> Call[None]:
    """Return the call that streams the change feed after the event with the id `after`."""
    return Call("GET", f"{_PREFIX}/events", lambda _: None, params={"after": after, "follow": True})


def training_steps(engine_id: str, after: int, max_points: int | None) -> Call[list[TrainingStep]]:
    """Return the call that reads the steps of a training run."""
    params = {"after": after, **({} if max_points is None else {"max_points": max_points})}
    return Call("GET", _engine(engine_id, "/training"), as_list(TrainingStep), params=params)


def _route(name: str) -> str:
    return f"{_PREFIX}/routes/{quote(name, safe='')}"


def routes() -> Call[list[RouteView]]:
    """Return the call that lists the routes."""
    return Call("GET", f"{_PREFIX}/routes", as_list(RouteView))


def get_route(name: str) -> Call[RouteView]:
    """Return the call that reads one route."""
    return Call("GET", _route(name), as_model(RouteView))


def set_route(name: str, engines: Mapping[str, int], fallback: str | None) -> Call[RouteView]:
    """Return the call that creates or replaces a route."""
    targets = [{"engine": engine, "weight": weight} for engine, weight in engines.items()]
    return Call("PUT", _route(name), as_model(RouteView), json={"engines": targets, "fallback": fallback})


def remove_route(name: str) -> Call[None]:
    """Return the call that deletes a route."""
    return Call("DELETE", _route(name), lambda _: None)


def devices() -> Call[list[Device]]:
    """Return the call that reads the devices."""
    return Call("GET", f"{_PREFIX}/gpu", as_list(Device))


def estimate(request: dict[str, Any]) -> Call[EstimateView]:
    """Return the call that estimates the memory of an engine."""
    return Call("POST", f"{_PREFIX}/estimate", as_model(EstimateView), json=request)


def test_webhooks() -> Call[list[WebhookResult]]:
    """Return the call that sends a test message to each webhook."""
    return Call("POST", f"{_PREFIX}/webhooks/test", as_list(WebhookResult))


def backends() -> Call[list[BackendView]]:
    """Return the call that lists the backends."""
    return Call("GET", f"{_PREFIX}/backends", as_list(BackendView))


def health(timeout_seconds: float) -> Call[dict[str, Any]]:
    """Return the call that checks whether the gateway is alive."""
    return Call("GET", "/health", lambda r: dict(parse(r.text)), timeout_seconds=timeout_seconds)


def models() -> Call[list[str]]:
    """Return the call that lists the model names that requests can use."""
    return Call("GET", "/v1/models", lambda r: [item["id"] for item in parse(r.text)["data"]])


def chat(model: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Call[str]:
    """Return the call that requests the next message of a chat from a model."""
    return Call(
        "POST", "/v1/chat/completions", lambda r: str(parse(r.text)["choices"][0]["message"]["content"] or ""),
        json={"model": model, "messages": messages, **options},
    )  # fmt: skip
