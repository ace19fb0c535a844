"""The Prometheus metrics."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from engine_views import engine_view, training_progress
from engines import record
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from sage.common.settings import load_settings
from sage.llm.client.types import Device, EngineKind, EngineState, EngineView
from sage.llm.control_plane.executors.base import Tokens
from sage.llm.control_plane.metrics import Measured, all_metrics
from sage.llm.control_plane.request_times import RequestTimes
from sage.llm.control_plane.store.transitions import TransitionCounts
from sage.llm.gateway.app import create_app

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


def of(engine: str, kind: str, **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"engine": engine, "kind": kind, "model": "m", **labels}.items()))


def test_the_metrics_have_the_names_and_values_that_prometheus_reads(tmp_path: Path) -> None:
    found = samples(full(datetime.now(UTC)), folders={"data": tmp_path / "missing" / "folder"})
    llm, run = of("engine-a", "llm"), of("engine-b", "finetune")
    assert found["sage_gateway_active", ()] == 1
    assert found["sage_engines", (("kind", "llm"), ("state", "running"))] == 1
    assert found["sage_engine_state", of("engine-c", "finetune", state="queued")] == 1
    assert found["sage_engine_memory_bytes", llm] == 7
    assert found["sage_engine_gpus", llm] == 1
    assert found["sage_engine_restarts_total", llm] == 2
    assert found["sage_engine_cpu_seconds_total", llm] == 1.5
    assert found["sage_engine_requests_in_progress", llm] == 2
    assert found["sage_engine_request_duration_seconds_bucket", of("engine-a", "llm", le="0.01")] == 0
    assert found["sage_engine_request_duration_seconds_bucket", of("engine-a", "llm", le="0.025")] == 2
    assert found["sage_engine_request_duration_seconds_bucket", of("engine-a", "llm", le="+Inf")] == 3
    assert found["sage_engine_request_duration_seconds_count", llm] == 3
    assert round(found["sage_engine_request_duration_seconds_sum", llm], 2) == 1000.04
    assert found["sage_engine_prompt_tokens_total", llm] == 3
    assert found["sage_engine_completion_tokens_total", llm] == 4
    assert found["sage_queue_engines", ()] == 1
    assert 60 <= found["sage_queue_oldest_wait_seconds", ()] < 120
    assert found["sage_training_loss", run] == 1
    assert found["sage_training_tokens_per_second", run] == 9
    assert found["sage_training_progress_ratio", run] == 0.5
    assert found["sage_training_eta_seconds", run] == 30
    assert round(found["sage_training_memory_estimate_error_ratio", run], 3) == 0.2
    assert found["sage_device_utilization_ratio", (("index", "0"), ("kind", "cuda"), ("node", "n"))] == 0.5
    assert 0 < found["sage_disk_free_bytes", (("folder", "data"),)] < found["sage_disk_size_bytes", (("folder", "data"),)]


def test_names_follow_the_rules_of_prometheus() -> None:
    for metric in all_metrics(full(datetime.now(UTC)), is_active=True, folders={}):
        assert metric.name.startswith("sage_")
        assert metric.name == metric.name.lower()
        assert not metric.name.endswith(("_ms", "_minutes", "_gb", "_percent", "_total")), metric.name
        assert metric.documentation.endswith(".")


def test_transitions_are_counted_with_the_time_in_the_state_before() -> None:
    counts, now = TransitionCounts(), datetime.now(UTC)
    for seconds in (10, 20):
        before = record(EngineState.QUEUED, state_at=now)
        counts.add(before, record(EngineState.STARTING, state_at=now + timedelta(seconds=seconds)))
    found = samples(Measured([], transitions=counts))
    assert found["sage_engine_transitions_total", (("after", "starting"), ("before", "queued"))] == 2
    assert found["sage_engine_transitions_total", (("after", "failed"), ("before", "running"))] == 0
    assert found["sage_engine_state_duration_seconds_sum", (("state", "queued"),)] == 30
    assert found["sage_engine_state_duration_seconds_count", (("state", "queued"),)] == 2


def test_an_engine_that_has_ended_has_no_metrics() -> None:
    measured = full(datetime.now(UTC))
    remaining: list[EngineView] = [engine for engine in measured.active if engine.id != "engine-a"]
    measured.request_times.forget_all_but({engine.id for engine in remaining})
    found = samples(Measured(remaining, tokens=measured.tokens, request_times=measured.request_times))
    assert not [labels for _, labels in found if ("engine", "engine-a") in labels]
    again = samples(Measured(measured.active, request_times=measured.request_times))
    assert again["sage_engine_request_duration_seconds_count", of("engine-a", "llm")] == 0


def test_the_gateway_answers_with_metrics_that_prometheus_reads() -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(create_app(load_settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8889") as client:
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            found = parsed(answer.text)
            assert found["sage_gateway_active", ()] == 0
            assert ("sage_disk_free_bytes", (("folder", "state"),)) in found

    asyncio.run(main())
