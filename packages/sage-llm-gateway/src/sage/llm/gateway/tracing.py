"""OpenTelemetry traces of inference requests. Tracing is on if an OTLP endpoint is set and the SDK is installed."""

import logging
import os

from sage.common.settings import Settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway.proxy import EngineProxy

logger = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: Maximum duration of an export. The exit of the gateway is delayed by at most this time, because the gateway first exports
#: the remaining spans.
_EXPORT_SECONDS = 2


def traced_proxy(manager: ControlPlaneManager, settings: Settings) -> EngineProxy:
    """If tracing is on, return a proxy that records traces. Otherwise, return a proxy without traces."""
    if not any(map(os.environ.get, _ENDPOINTS)):
        return EngineProxy(manager, settings)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from sage.llm.gateway.traced_proxy import TracedProxy
    except ModuleNotFoundError as error:
        logger.warning("there are no traces, because %s is missing: pip install 'sage-llm-gateway[tracing]'", error.name)
        return EngineProxy(manager, settings)
    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "sage-gateway")})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_SECONDS)))
    return TracedProxy(manager, settings, provider)
