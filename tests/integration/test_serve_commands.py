"""Served runs and routes with the real command line, gateway, trainer and model server."""

import json
from pathlib import Path

import pytest
from support import SAMPLES, engine_of, list_engines, sage, wait_for

from sage.cli.daemon import find_client

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.mark.long
def test_a_route_serves_a_checkpoint_while_the_run_continues_and_then_the_result(tiny_model: Path, tmp_path: Path) -> None:
    base = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "base"))
    options = ("--dataset", str(SAMPLES), "--output", str(tmp_path / "out"), "--max-steps", "1000000", "--serve-as", "tuned")
    run = engine_of(sage("llm", "fine-tune", "--base-model", str(tiny_model), "--save-steps", "1000000", *options))
    sage("route", "set", "prod", "tuned", "--fallback", "base")
    client = find_client()
    answer = {"max_tokens": 4, "temperature": 0}

    def answered_by(model: str) -> str:
        response = client._http.post("/v1/chat/completions", json={"model": model, "messages": CHAT, **answer})
        return str(response.raise_for_status().json()["model"])

    assert answered_by("prod") == "base"
    checkpoint = Path(sage("llm", "engine", "checkpoint", run).stdout.strip())
    assert (checkpoint / "adapter_model.safetensors").is_file()
    tuned = wait_for(lambda: client.get_engine(run).served_by, "an engine that serves the run")
    wait_for(lambda: client.get_engine(tuned).state == "running", "the checkpoint")
    assert (answered_by("prod"), answered_by("tuned")) == ("tuned", "tuned")
    assert client.get_engine(run).state == "running"
    assert client.get_engine(tuned).server_id == client.get_engine(base).server_id
    sage("llm", "engine", "stop", run)
    wait_for(lambda: client.get_engine(tuned).model == str(tmp_path / "out"), "the result")
    assert answered_by("prod") == "tuned"
    sage("llm", "engine", "stop", tuned)
    assert answered_by("prod") == "base"
    [route] = json.loads(sage("route", "list", "--json").stdout)
    assert (route["name"], route["engines"][0]["state"], route["fallback"]) == ("prod", None, "base")
    sage("route", "remove", "prod")
    assert set(list_engines()) == {base, run, tuned}


@pytest.mark.long
def test_an_idle_engine_is_paused_and_a_chat_loads_it_again(tiny_model: Path) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "base", "--idle-stop", "0.02"))
    client = find_client()
    wait_for(lambda: client.get_engine(engine).state == "paused", "the pause")
    status = sage("llm", "engine", "status", engine).stdout
    assert "The next request loads the engine again" in status
    assert isinstance(client.chat("base", CHAT, max_tokens=4), str)
    sage("llm", "engine", "stop", engine)
    assert client.get_engine(engine).state == "stopped"
