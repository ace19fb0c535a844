"""The Prometheus metrics."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from engines import record
from scrapes import full, parsed, samples

from sage.common.settings import load_settings
from sage.llm.client.types import EngineState, EngineView
from sage.llm.control_plane.metrics import Measured, all_metrics
from sage.llm.control_plane.store.transitions import TransitionCounts
from sage.llm.gateway.app import create_app


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


def test_transitions_are_counted_with_the_time_in_the_previous_state() -> None:
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
