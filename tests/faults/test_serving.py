"""The server of a model is killed while it answers."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support import engine_of, list_engines, sage, wait_for

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.timeout(300)
def test_a_stream_whose_server_is_killed_ends_with_an_error_and_the_server_is_restarted(
    tiny_model: Path, sage_home: Path
) -> None:
    start = ("llm", "engine", "start", str(tiny_model), "--name", "tiny", "--restart-policy", "on-failure")
    engine = engine_of(sage(*start))
    url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1/chat/completions"
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0}

    def now() -> dict[str, Any]:
        return list_engines()[engine]

    before = now()
    # The request forbids end tokens, so that the stream is long.
    long = {**body, "max_tokens": 450, "stream": True, "logit_bias": {"2": -100}}
    with httpx.stream("POST", url, json=long, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        os.kill(before["pid"], signal.SIGKILL)
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
    wait_for(lambda: now()["state"] == "running" and now()["restarts"] == 1, "the restart")
    answer = httpx.post(url, json={**body, "max_tokens": 4}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4
    after = now()
    assert after["pid"] != before["pid"]
    sage("llm", "engine", "stop", "--force", engine)
    assert now()["state"] == "stopped"
    assert not psutil.pid_exists(after["pid"])
    assert not [process.pid for process in psutil.process_iter() if "workers.generation" in _command(process, sage_home)]


def _command(process: psutil.Process, home: Path) -> str:
    """Return the command line of a process whose SAGE_HOME is `home`, or an empty text for any other process."""
    try:
        return " ".join(process.cmdline()) if process.environ().get("SAGE_HOME") == str(home) else ""
    except psutil.Error:
        return ""
