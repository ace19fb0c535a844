"""OpenTelemetry traces, sent to a real OTLP receiver on loopback."""

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from gateways import ASK, CHAT, engine, gateway, until
from http_servers import listening
from support import free_port

from sage.llm.gateway.proxy import EngineProxy

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
if_sdk = pytest.mark.skipif(
    not importlib.util.find_spec("opentelemetry.sdk") or not importlib.util.find_spec("opentelemetry.exporter"),
    reason="the OpenTelemetry SDK is not installed",
)


@contextlib.asynccontextmanager
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Any]]:
    """Run an OTLP receiver and yield the list of received spans. Gateways that are created in the block send spans there."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    async def receive(request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", receive)
    async with listening(app) as port:
        for name, value in {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "10",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield spans


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: pair.value.int_value or pair.value.string_value for pair in span.attributes}


@if_sdk
def test_the_gateway_adds_one_span_between_the_client_s_span_and_the_engine_s_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = ""

    async def answer(request: web.Request) -> web.Response:
        nonlocal passed
        passed = request.headers["traceparent"]
        return web.json_response({"model": "tiny"})

    async def main() -> None:
        async with receiver(monkeypatch) as spans, engine(answer) as port, gateway(port) as client:
            assert (await client.post(CHAT, json=ASK, headers={"traceparent": PARENT})).status_code == 200
            await until(lambda: bool(spans), "the span")
            [span] = spans
            assert passed == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
            assert f"00-{span.trace_id.hex()}-{span.parent_span_id.hex()}-01" == PARENT
            assert span.name == "chat tiny"
            assert attributes(span) == {
                "http.request.method": "POST", "http.route": CHAT, "http.response.status_code": 200,
                "gen_ai.operation.name": "chat", "gen_ai.request.model": "tiny", "sage.engine.id": "engine-a",
            }  # fmt: skip
            assert "Hello" not in str(span)  # the prompt

    asyncio.run(asyncio.wait_for(main(), 60))


@if_sdk
def test_the_span_of_a_failed_request_has_its_status_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with receiver(monkeypatch) as spans, gateway(free_port()) as client:
            answer = await client.post(CHAT, json=ASK)
            assert answer.status_code == 502
            await until(lambda: bool(spans), "the span")
            found = attributes(spans[0])
            assert (found["http.response.status_code"], found["error.type"]) == (502, "engine_died")
            assert spans[0].status.code == 2  # ERROR

    asyncio.run(asyncio.wait_for(main(), 60))


def test_without_an_endpoint_or_without_the_sdk_there_are_no_traces(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def proxy_type() -> type:
        async with gateway(1) as client:
            return type(client.app.gate._proxy)  # type: ignore[attr-defined]

    assert asyncio.run(proxy_type()) is EngineProxy
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert asyncio.run(proxy_type()) is EngineProxy
    assert "pip install 'sage-llm-gateway[tracing]'" in caplog.text
