"""The metrics of a real engine behind a real gateway."""

import os
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support import engine_of, sage, wait_for

from sage.cli.daemon import find_client


def metrics_of(engine: str) -> dict[str, float]:
    """Return the values of the metrics that have the label of an engine, without the buckets of histograms."""
    text = httpx.get(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/metrics", trust_env=False, timeout=60).text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name: sample.value for sample in found if sample.labels.get("engine") == engine and "le" not in sample.labels
    }


def test_metrics_count_the_requests_tokens_and_cpu_time_of_an_engine_until_it_ends(tiny_model: Path) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "tiny"))
    client = find_client()
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    usage = client._http.post("/v1/chat/completions", json=ask).json()["usage"]
    wait_for(lambda: metrics_of(engine)["sage_engine_completion_tokens_total"], "the next health check")
    found = metrics_of(engine)
    assert found["sage_engine_prompt_tokens_total"] == usage["prompt_tokens"]
    assert found["sage_engine_completion_tokens_total"] == usage["completion_tokens"]
    assert found["sage_engine_request_duration_seconds_count"] == 1
    assert found["sage_engine_request_duration_seconds_sum"] > 0
    assert found["sage_engine_requests_in_progress"] == 0
    assert found["sage_engine_cpu_seconds_total"] > 0
    assert found["sage_engine_memory_bytes"] > 0
    sage("llm", "engine", "stop", engine)
    assert metrics_of(engine) == {}
