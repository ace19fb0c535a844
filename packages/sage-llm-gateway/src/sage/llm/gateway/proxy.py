"""Forward each inference request to the engine that the field `model` selects, and relay the engine's answer."""

import functools
import time

from starlette.types import Receive, Scope, Send

from sage.common.errors import Busy, ConfigError, SageError
from sage.common.settings import Settings
from sage.llm.client.types import DEFAULT_MODEL, EngineKind
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.routing import Upstream
from sage.llm.gateway.engine_connections import EngineConnections
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.headers import HOP_BY_HOP, forwarded, value
from sage.llm.gateway.interruption import Interruption, Watch
from sage.llm.gateway.json_text import JsonBody
from sage.llm.gateway.relay import Relay
from sage.llm.gateway.schema import MAX_MODEL_CHARS

#: HTTP paths of inference requests, and the kind of engine for each path.
_KINDS = {
    "/v1/chat/completions": EngineKind.LLM,
    "/v1/completions": EngineKind.LLM,
    "/v1/embeddings": EngineKind.EMBEDDING,
}
#: Request headers that are not forwarded to the engine.
_NOT_FORWARDED = HOP_BY_HOP | {b"authorization", b"cookie", b"host", b"origin", b"referer", b"accept-encoding"}


def is_inference(scope: Scope) -> bool:
    """Return whether a request is an inference request, which the proxy answers."""
    return scope["path"] in _KINDS and scope["method"] == "POST"


class EngineProxy:
    """Forwards requests to engines, and limits the number of requests in progress for each engine."""

    def __init__(self, manager: ControlPlaneManager, settings: Settings) -> None:
        self._manager, self._wait_seconds = manager, settings.request_wait_seconds
        self._connections = EngineConnections()
        self._limit = settings.max_engine_requests
        self._in_progress, self._add_time = manager.requests_in_progress, manager.request_times.add
        self._watch = Watch()

    def close(self) -> None:
        """Close the idle connections to engines."""
        self._connections.close()

    async def forward(self, body: JsonBody | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. If the client disconnects before the answer is complete, the request to the engine is cancelled.

        Raises SageError if the request cannot be answered, ClientDisconnect if the client disconnects.
        """
        model, relay, begun_seconds = requested_model(body), None, time.perf_counter()
        assert body
        try:
            with Interruption(self._watch, receive, self._manager.is_responsive) as interruption:
                client = _client(body, scope)
                upstream = await self._manager.running(model, _KINDS[scope["path"]], self._wait_seconds, client)
                interruption.engine_id, relay = upstream.engine_id, Relay(upstream, send)
                self._enter(upstream.engine_id)
                try:
                    await self._exchange(upstream, body, scope, relay)
                finally:
                    self._leave(upstream.engine_id, begun_seconds)
        except (SageError, OSError, EOFError) as error:
            if relay is None:
                raise
            await relay.fail(error, value(scope["headers"], b"x-request-id").decode("latin-1"))

    async def _exchange(self, upstream: Upstream, body: JsonBody, scope: Scope, relay: Relay) -> None:
        _check_parameters(upstream, body)
        name = upstream.model_name
        pieces = [body.content] if name in (None, body.texts["model"]) else body.with_model(name)
        head = _head(upstream, scope, sum(map(len, pieces)))
        answer = await self._connections.post(upstream.address, head, pieces)
        try:
            await relay.forward(answer)
        finally:
            self._connections.release(answer)

    def _enter(self, engine_id: str) -> None:
        if self._in_progress[engine_id] >= self._limit:
            raise Busy(code="engine_busy", message=f"{engine_id} already has {self._limit} requests in progress.",
                       hint="Retry in some seconds, or raise the setting max_engine_requests.")  # fmt: skip
        self._in_progress[engine_id] += 1

    def _leave(self, engine_id: str, begun_seconds: float) -> None:
        self._add_time(engine_id, time.perf_counter() - begun_seconds)
        self._in_progress[engine_id] -= 1
        if not self._in_progress[engine_id]:
            del self._in_progress[engine_id]


def requested_model(body: JsonBody | None) -> str:
    """Return a request's `model`. Raises Refusal if there is no body, ConfigError if the body has no valid `model`."""
    if body is None:
        raise Refusal(400, "invalid_json", "The body is empty.", "Send a JSON object.")
    if model := body.texts.get("model"):
        return model
    message = f"'model' is required and must be text of 1 to {MAX_MODEL_CHARS} characters."
    hint = f"Send '{DEFAULT_MODEL}' to use the engine that became ready last."
    raise ConfigError(code="model_required", message=message, hint=hint, param="model")


def _client(body: JsonBody, scope: Scope) -> str | None:
    """Return a text that identifies a request's client: the field `user`, else the header Authorization, else None.

    Model routes with several engines send all requests of a client to the same engine.
    """
    user = body.texts.get("user") or value(scope["headers"], b"authorization").decode("latin-1")
    return user or None


def _check_parameters(upstream: Upstream, body: JsonBody) -> None:
    """Raise ConfigError if the request has a field that the engine's server would ignore."""
    if upstream.parameters is not None and (unknown := sorted(body.names - upstream.parameters)):
        message = f"{unknown[0]} is not supported by this engine."
        raise ConfigError(code="unsupported_value", message=message, hint="Remove this field.", param=unknown[0])


def _head(upstream: Upstream, scope: Scope, length: int) -> bytes:
    """Return the head of the request to the engine's server.

    Header names and values need no escaping, because the gateway's HTTP parser rejects line breaks in them.
    """
    query = scope["query_string"]
    target = scope["path"].encode() + (b"?" + query if query else b"")
    lines = [b"%s: %s\r\n" % header for header in forwarded(scope["headers"], _NOT_FORWARDED)]
    return b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
        target, _server_headers(upstream.address, upstream.key), b"".join(lines), length
    )  # fmt: skip


@functools.lru_cache(1024)
def _server_headers(address: str, key: str) -> bytes:
    return f"host: {address}\r\naccept-encoding: identity\r\nauthorization: Bearer {key}\r\n".encode()
