"""An inference server in its own process: its socket, its stop, and clients that disconnect."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support import wait_for

#: Request for an answer that ends only when the context is full, because its end tokens are forbidden.
ENDLESS = {"model": "m", "prompt": "Hello", "max_tokens": 10**6, "logit_bias": {"0": -100, "1": -100, "2": -100}}


@dataclass
class Worker:
    """A worker process and its URL."""

    process: subprocess.Popen[bytes]
    url: str

    def complete(self, max_tokens: int) -> httpx.Response:
        body = {"model": "m", "prompt": "Hello", "max_tokens": max_tokens, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False)


@pytest.fixture
def worker(tiny_model: Path, tmp_path: Path) -> Iterator[Worker]:
    """A worker that listens on an inherited socket, and whose context takes hours to fill."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**7}))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        options = ["--model", str(folder), "--fd", str(listening.fileno())]
        argv = [sys.executable, "-m", "sage.llm.workers", "generation", *options]
        environment = {**os.environ, "SAGE_ENGINE_ID": "engine-0123456789"}
        process = subprocess.Popen(argv, pass_fds=[listening.fileno()], env=environment, stderr=subprocess.DEVNULL)

    def health() -> httpx.Response | None:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", timeout=5, trust_env=False)
        return None

    answer = wait_for(health, "readiness")
    found = answer.json()
    assert found.pop("threads") >= 1
    assert found == {
        "status": "ok", "engine": "engine-0123456789", "pid": process.pid, "context_tokens": 10**7, "slots": 16,
        "tokens": {"": [0, 0]},
        "slots_in_use": 0,
        "is_active": False,
    }  # fmt: skip
    yield Worker(process, url)
    process.kill()
    process.wait()


def test_requests_of_disconnected_clients_do_not_delay_the_next_request(worker: Worker) -> None:
    def leave(stream: bool, wait_for_text: bool) -> None:
        with socket.create_connection(("127.0.0.1", int(worker.url.rpartition(":")[2]))) as client:
            body = json.dumps({**ENDLESS, "stream": stream}).encode()
            headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
            if wait_for_text:
                assert client.recv(100).startswith(b"HTTP/1.1 200")

    leave(stream=True, wait_for_text=True)
    for index in range(6):
        leave(stream=index % 2 == 0, wait_for_text=False)
    assert worker.complete(2).json()["usage"]["completion_tokens"] == 2


def test_a_worker_that_is_stopped_ends_its_answers_with_an_error(worker: Worker) -> None:
    with httpx.stream("POST", f"{worker.url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        worker.process.send_signal(signal.SIGTERM)
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert rest[-1]["error"]["code"] == "engine_stopping"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in rest[:-1])
    assert worker.process.wait(timeout=30) in (0, -signal.SIGTERM)
