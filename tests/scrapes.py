"""Scrapes of the Prometheus metrics, for tests without a gateway."""

from datetime import datetime, timedelta
from pathlib import Path

from engine_views import engine_view, training_progress
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from sage.llm.client.types import Device, EngineKind, EngineState
from sage.llm.control_plane.executors.base import Tokens
from sage.llm.control_plane.metrics import Measured, all_metrics
from sage.llm.control_plane.request_times import RequestTimes

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
DEVICE = Device(
    node="n", kind="cuda", index=0, name="GPU", memory_total_bytes=8, memory_used_bytes=2, utilization_percent=50,
    temperature_celsius=40,
)  # fmt: skip


def parsed(text: str) -> Samples:
    """Return the value of each sample by its name and its labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples
    }


def samples(measured: Measured, *, is_active: bool = True, folders: dict[str, Path] | None = None) -> Samples:
    """Return the metrics as Prometheus reads them."""
    registry = CollectorRegistry()

    class Metrics(Collector):
        def collect(self):  # type: ignore[no-untyped-def]
            return all_metrics(measured, is_active=is_active, folders=folders or {})

    registry.register(Metrics())
    return parsed(generate_latest(registry).decode())


def full(now: datetime) -> Measured:
    """Return a scrape in which every metric has a value."""
    llm = engine_view(id="engine-a", kind="llm", devices=["cuda:0"], memory_bytes=7, restarts=2)
    steps = dict.fromkeys(("loss", "token_accuracy", "reward", "reward_accuracy", "learning_rate", "grad_norm"), 1)
    progress = training_progress(**steps, epoch=1, tokens_per_second=9, memory_bytes=4, peak_memory_bytes=5,
                                 heldout_loss=2, eta_seconds=30, estimated_memory_bytes=6)  # fmt: skip
    run = engine_view(id="engine-b", training=progress)
    queued = engine_view(id="engine-c", state="queued", state_at=now - timedelta(seconds=60))
    times = RequestTimes()
    for seconds in (0.02, 0.02, 1000):
        times.add("engine-a", seconds)
    return Measured(
        [llm, run, queued], {(EngineKind.LLM, EngineState.RUNNING): 1}, [queued], [DEVICE], {"engine-a": Tokens(3, 4)},
        {"engine-a": 1.5}, {"engine-a": 2}, times,
    )  # fmt: skip
