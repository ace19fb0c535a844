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

from sage.llm.gateway.routes.dependencies import Manager

router = APIRouter()


@router.get("/health")
def health() -> dict[str, Any]:
    """Report that the gateway's process is alive."""
    return {"status": "ok", "service": "sage-gateway", "version": version("sage-llm-gateway"), "pid": os.getpid()}


@router.get("/ready")
async def ready(manager: Manager) -> dict[str, Any]:
    """Report the gateway's role (active or standby), the number of engines by state, and problems.

    The request fails if the database fails.
    """
    counts = await manager.counts()
    states: Counter[str] = Counter()
    for (_, state), number in counts.items():
        states[state] += number
    problems = manager.problems()
    return {
        "status": "degraded" if problems else "ready",
        "role": manager.role,
        "engines": states.total(),
        "states": dict(states),
        "problems": problems,
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(manager: Manager) -> PlainTextResponse:
    """Return the metrics of engines and devices in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Once(await manager.metrics()))
    return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")


class _Once(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
