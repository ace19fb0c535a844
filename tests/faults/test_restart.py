"""The gateway is restarted while 16 clients wait for answers of a model."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import sage, wait_for

from sage.common.processes import holder
from sage.llm.client import SageClient

_CLIENTS = 16
_SHORT: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
#: A request whose answer takes minutes. End tokens are forbidden.
_LONG = {**_SHORT, "max_tokens": 60_000, "logit_bias": {"2": -100}}


@pytest.fixture
def patient_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that can generate very long answers."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65_536}))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGKILL])
def test_clients_are_answered_after_a_restart_under_load_and_interrupted_answers_are_cancelled(
    patient_model: Path, sage_home: Path, stop_signal: signal.Signals
) -> None:
    sage("gateway", "start")
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}"
    client = SageClient(base_url)
    engine = client.start_engine(model=str(patient_model), name="tiny", options={"slots": _CLIENTS})
    wait_for(lambda: client.get_engine(engine.id).state == "running", "the engine")
    before = client.get_engine(engine.id)
    expected = _ask(base_url, _SHORT)
    assert expected

    def slots_in_use() -> int:
        return int(httpx.get(f"http://{before.address}/health", timeout=30).json()["slots_in_use"])

    with ThreadPoolExecutor(_CLIENTS) as clients:
        interrupted = [clients.submit(_ask, base_url, _LONG) for _ in range(_CLIENTS)]
        wait_for(lambda: slots_in_use() == _CLIENTS, "all answers to begin")
        os.kill(client.health()["pid"], stop_signal)
        wait_for(lambda: holder(sage_home / "state/gateway.lock") is None, "the end of the gateway")
        wait_for(lambda: slots_in_use() == 0, "the cancellation of all answers", 60)
        assert [answer.result() for answer in interrupted] == [None] * _CLIENTS
        retried = [clients.submit(wait_for, _asking(base_url), "an answer") for _ in range(_CLIENTS)]
        sage("gateway", "start")
        assert [answer.result() for answer in retried] == [expected] * _CLIENTS
    after = client.get_engine(engine.id)
    assert (after.state, after.pid, after.restarts) == ("running", before.pid, 0)
    assert slots_in_use() == 0


def _asking(base_url: str) -> Callable[[], str | None]:
    return lambda: _ask(base_url, _SHORT)


def _ask(base_url: str, body: dict[str, Any]) -> str | None:
    """Return the text of an answer; None if the request fails or the answer is interrupted."""
    try:
        answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=300, trust_env=False)
    except httpx.TransportError:
        return None
    return str(answer.json()["choices"][0]["text"]) if answer.is_success else None
