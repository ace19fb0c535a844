"""Probes and metrics."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from sage.llm.control_plane.inventory import list_devices
from sage.llm.control_plane.metrics import engine_metrics
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter()


@router.get("/health")
def health() -> dict[str, Any]:
    """Say that the process lives."""
    return {"status": "ok", "service": "sage-gateway", "version": version("sage-llm-gateway"), "pid": os.getpid()}


@router.get("/ready")
async def ready(manager: Manager) -> dict[str, Any]:
    """Say that the store answers."""
    return {"status": "ready", "engines": len(await manager.list_engines())}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(manager: Manager) -> PlainTextResponse:
    """Return the engines' figures in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Once(list(engine_metrics(await manager.list_engines(), list_devices()))))
    return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")


class _Once(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield what was read for this scrape."""
        yield from self._metrics
