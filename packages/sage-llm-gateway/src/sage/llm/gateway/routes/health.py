"""HTTP routes for health probes and metrics."""

import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from sage.llm.control_plane.metrics import engine_metrics
from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter()


@router.get("/health")
def health() -> dict[str, Any]:
    """Report that the gateway's process is alive."""
    return {"status": "ok", "service": "sage-gateway", "version": version("sage-llm-gateway"), "pid": os.getpid()}


@router.get("/ready")
async def ready(manager: Manager) -> dict[str, Any]:
    """Report the gateway's role (active or standby) and the number of engines by state; fails without the database."""
    counts = await manager.counts()
    states: Counter[str] = Counter()
    for (_, state), number in counts.items():
        states[state] += number
    return {"status": "ready", "role": manager.role, "engines": states.total(), "states": dict(states)}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(manager: Manager) -> PlainTextResponse:
    """Return the metrics of engines and devices in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(
        _Once(list(engine_metrics(await manager.counts(), await manager.list_active(), await manager.list_devices())))
    )
    return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")


class _Once(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
