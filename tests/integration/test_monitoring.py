"""Metrics and webhooks of a real engine behind a real gateway."""

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import engine_of, free_port, sage, wait_for

from sage.cli.daemon import find_client

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLjSw"


class Endpoint(BaseHTTPRequestHandler):
    received: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body["type"])
        self.send_response(204)
        self.end_headers()


def metrics_of(engine: str) -> dict[str, float]:
    """Return the values of the metrics that have the label of an engine, without the buckets of histograms."""
    text = httpx.get(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/metrics", trust_env=False, timeout=60).text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    own = [sample for sample in found if sample.labels.get("engine") == engine and "le" not in sample.labels]
    return {sample.name: sample.value for sample in own}


def test_metrics_count_until_the_engine_ends_and_a_killed_gateway_loses_no_webhook_message(
    tiny_model: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("SAGE_WEBHOOK_URLS", f"http://127.0.0.1:{port}/hunter2")
    monkeypatch.setenv("SAGE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
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

    log = next(sage_home.rglob("gateway.log"))
    wait_for(lambda: "to host 127.0.0.1 failed, retry in 5 s" in log.read_text(), "an attempt without a server")
    os.kill(int(client.health()["pid"]), signal.SIGKILL)
    with ThreadingHTTPServer(("127.0.0.1", port), Endpoint) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        sage("gateway", "start")
        wait_for(lambda: Endpoint.received == ["engine.running"], "the message")
        assert sage("webhook", "test").stdout == "127.0.0.1: delivered\n"
        endpoint.shutdown()
    assert "ConnectError" in sage("webhook", "test", check=1).stdout
    sage("llm", "engine", "stop", engine)
    assert metrics_of(engine) == {}
    assert "hunter2" not in log.read_text()
    assert SECRET not in log.read_text()
