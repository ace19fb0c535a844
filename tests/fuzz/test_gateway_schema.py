"""For every request, the gateway answers as documented, without server errors or hangs, and its engines still answer."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fuzzing import CASES, fuzz, inference
from support import engine_of, list_engines, sage

MODELS = {"/v1/chat/completions": "tiny", "/v1/completions": "tiny", "/v1/embeddings": "minilm"}


@pytest.fixture
def gateway(tiny_model: Path) -> Iterator[httpx.Client]:
    """Yield a client of a gateway with a running `llm` engine and a running `embedding` engine."""
    sage("llm", "engine", "start", str(tiny_model), "--name", "tiny")
    sage("llm", "engine", "start", "all-minilm-l6-v2", "--engine-kind", "embedding", "--name", "minilm")
    with httpx.Client(base_url=f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}", timeout=60) as client:
        yield client


def asker(gateway: httpx.Client) -> Any:
    def ask() -> None:
        messages = [{"role": "user", "content": "Hello"}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 1}
        assert gateway.post("/v1/chat/completions", json=chat).status_code == 200
        assert gateway.post("/v1/embeddings", json={"model": "minilm", "input": "a"}).status_code == 200

    return ask


@pytest.mark.parametrize("cases", CASES)
def test_the_gateway_answers_every_request_as_documented(gateway: httpx.Client, tiny_model: Path, cases: int) -> None:
    ended = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "ended", "--no-wait"))
    sage("llm", "engine", "stop", ended)
    document = gateway.get("/openapi.json").json()
    management = {path: item for path, item in document["paths"].items() if path not in MODELS}
    for item in management.values():
        for parameter in item.get("get", {}).get("parameters", ()):
            if parameter["name"] == "engine_id":  # the streams of an engine that has ended are finite
                parameter["schema"] = {"enum": [ended, ended, "engine-unknown"]}
    feed = management["/v1/management/events"]["get"]
    # A stream with the parameter `follow` does not end.
    feed["parameters"] = [each for each in feed["parameters"] if each["name"] != "follow"]
    for part in (*inference(document, MODELS), {**document, "paths": management}):
        fuzz(part, str(gateway.base_url), cases // 3, asker(gateway))
    assert {engine["state"] for engine in list_engines().values()} == {"running", "stopped"}
