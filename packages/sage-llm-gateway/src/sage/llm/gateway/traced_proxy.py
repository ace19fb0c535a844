"""A proxy that records OpenTelemetry traces. This module is imported only if traces are on, because the import is slow."""

from opentelemetry import propagate
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from starlette.types import Message, Receive, Scope, Send

from sage.common.errors import SageError
from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.json_text import JsonBody
from sage.llm.gateway.proxy import EngineProxy

#: Key: path after /v1/. Value: operation name in OpenTelemetry's semantic conventions for generative AI.
_OPERATIONS = {"chat/completions": "chat", "completions": "text_completion", "embeddings": "embeddings"}


class TracedProxy(EngineProxy):
    """A proxy that records one span for each request, and passes the span to the engine in the header `traceparent`."""

    def __init__(self, manager: ControlPlaneManager, settings: Settings, provider: TracerProvider) -> None:
        super().__init__(manager, settings)
        self._tracer = provider.get_tracer("sage.llm.gateway")

    async def forward(self, body: JsonBody | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request within a span. The attributes of the span contain neither prompts nor answers."""
        operation, model = _OPERATIONS[scope["path"].removeprefix("/v1/")], body.texts.get("model", "") if body else ""
        attributes = {
            "http.request.method": scope["method"], "http.route": scope["path"], "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
        }  # fmt: skip
        known = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            f"{operation} {model}", propagate.extract(known), SpanKind.SERVER, attributes,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            passed: dict[str, str] = {}
            propagate.inject(passed)
            own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in passed.items()]
            others = [header for header in scope["headers"] if header[0].decode("latin-1") not in passed]
            try:
                await super().forward(body, {**scope, "headers": [*others, *own]}, receive, _recording(span, send))
            except SageError as error:
                _set_status(span, error.http_status, error.code)
                raise


def _recording(span: Span, send: Send) -> Send:
    """Return a function that records the status and the engine of an answer, and then sends the answer."""

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.add_event("response started")
            span.set_attribute("sage.engine.id", dict(message["headers"]).get(b"x-sage-engine-id", b"").decode())
            _set_status(span, message["status"])
        await send(message)

    return recorded


def _set_status(span: Span, status: int, code: str = "") -> None:
    span.set_attribute("http.response.status_code", status)
    if code:
        span.set_attribute("error.type", code)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
