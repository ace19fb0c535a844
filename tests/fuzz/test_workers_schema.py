"""Send random requests directly to a worker. No request may cause a server error or a hang, or stop the worker."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fuzzing import CASES, fuzz, inference
from support import free_port, wait_for

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@contextlib.contextmanager
def worker(module: str, model: str) -> Iterator[httpx.Client]:
    """Run a worker process, wait until it answers, and yield a client that sends requests to it."""
    port = free_port()
    argv = [sys.executable, "-m", "sage.llm.workers", module, "--model", model, "--port", str(port)]
    with subprocess.Popen(argv) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def is_up() -> bool:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                return client.get("/health").status_code == 200
            return False

        try:
            wait_for(is_up, "the worker's start")
            yield client
        finally:
            process.kill()


def asker(client: httpx.Client, path: str, body: dict[str, Any]) -> Callable[[], None]:
    def ask() -> None:
        assert client.post(path, json={"model": "any", **body}).status_code == 200

    return ask


@pytest.mark.parametrize("cases", CASES)
def test_no_request_breaks_the_generation_worker(tiny_model: Path, cases: int) -> None:
    with worker("generation", str(tiny_model)) as client:
        ask = asker(client, COMPLETIONS, {"prompt": "Hello", "max_tokens": 1})
        for document in inference(client.get("/openapi.json").json(), dict.fromkeys((CHAT, COMPLETIONS), "any")):
            fuzz(document, str(client.base_url), cases // 2, ask)


@pytest.mark.parametrize("cases", CASES)
def test_no_request_breaks_the_embedding_worker(cases: int) -> None:
    with worker("embedding", "all-minilm-l6-v2") as client:
        ask = asker(client, EMBEDDINGS, {"input": "Hello"})
        for document in inference(client.get("/openapi.json").json(), {EMBEDDINGS: "any"}):
            fuzz(document, str(client.base_url), cases // 2, ask)
