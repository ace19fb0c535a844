"""Engines and gateways as real processes: engines continue without a gateway, and the next gateway adopts them."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import httpx
import pytest
from support import HELDOUT, SAGE, SAMPLES, engine_of, environment, free_port, list_engines, sage, wait_for

from sage.common.errors import Conflict
from sage.common.processes import holder
from sage.llm.client import AsyncSageClient, SageClient
from sage.llm.control_plane.executors.finetune_executor import FinetuneEngine, FinetuneEngineConfig


def url() -> str:
    return f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}"


def start_training(model: Path, output: Path, *options: str) -> str:
    arguments = ("--dataset", str(SAMPLES), "--output", str(output), "--batch-size", "1", *options)
    return engine_of(sage("llm", "engine", "start", str(model), "--engine-kind", "finetune", *arguments))


def kill_gateway() -> None:
    pid = json.loads(sage("gateway", "status", "--json").stdout)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: holder(Path(os.environ["SAGE_HOME"]) / "state/gateway.lock") is None, "the end of the gateway")


def test_training_continues_without_the_gateway_and_the_next_gateway_adopts_it(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    engine = start_training(tiny_model, tmp_path / "out", "--num-epochs", "40", "--save-steps", "1000")
    follow = [*SAGE, "llm", "engine", "logs", engine, "--follow"]
    follower = subprocess.Popen(follow, env=environment(sage_home), stdout=subprocess.PIPE)
    assert follower.stdout is not None
    wait_for(lambda: list_engines()[engine]["training"]["step"] >= 3, "a step")
    pid = list_engines()[engine]["pid"]
    kill_gateway()
    run = SageClient(url())
    with pytest.raises(Exception, match="does not answer"):
        run.list_engines()
    events = sage_home / "data/models/finetuned" / engine.replace("engine", "task") / "events.jsonl"
    before = events.read_text().count('"event": "step"')
    wait_for(lambda: events.read_text().count('"event": "step"') > before + 3, "training to go on")
    listed = list_engines()[engine]  # this command starts the gateway again
    assert listed["state"] == "running"
    assert listed["pid"] == pid
    assert listed["training"]["step"] > before
    stopped = sage("llm", "engine", "stop", engine).stdout
    assert f"{engine} is stopped at step" in stopped
    assert f"result in {tmp_path / 'out'}" in stopped
    assert "checkpoint " in stopped
    followed, _ = follower.communicate(timeout=60)
    log = events.with_name("worker.log").read_bytes()
    assert b"stopped at step" in followed
    assert log.endswith(followed)  # no line is lost or repeated although the gateway was killed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "stopped" in sage("llm", "engine", "logs", engine, "--tail", "1").stdout


def test_a_killed_training_run_fails_within_seconds_and_can_be_resumed(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--num-epochs", "2", "--save-steps", "5", "--restart-policy", "no")
    engine = start_training(tiny_model, tmp_path / "out", *options)
    wait_for(lambda: (list_engines()[engine]["training"]["checkpoint_step"] or 0) >= 5, "a checkpoint")
    os.kill(list_engines()[engine]["pid"], signal.SIGKILL)
    wait_for(lambda: list_engines()[engine]["state"] == "failed", "the failure", seconds=5)
    told = sage("llm", "engine", "status", engine).stdout
    assert "the training process was killed by SIGKILL (out of memory?)" in told
    assert "continues from checkpoint" in told
    done = sage("llm", "engine", "resume", engine, "--wait")
    assert done.stdout.split() == [engine]
    assert "is completed at step 184 of 184" in done.stderr
    again = sage("llm", "engine", "resume", engine, check=1)
    assert "is completed: only stopped, failed and paused engines can be resumed" in again.stderr
    assert "was already completed" in sage("llm", "engine", "stop", engine).stdout


@pytest.mark.long
def test_the_command_fine_tune_starts_a_finetune_engine(tiny_model: Path, tmp_path: Path) -> None:
    done = sage(
        "llm", "fine-tune", "--base-model", str(tiny_model), "--dataset", str(SAMPLES), "--output", str(tmp_path / "out"),
        "--lora-rank", "4", "--max-steps", "3", "--eval", str(HELDOUT), "--wait",
    )  # fmt: skip
    assert done.stdout.startswith("Fine-tune engine started: engine-")
    engine = engine_of(done)
    assert "Held-out loss" in done.stderr
    assert json.loads((tmp_path / "out/sage_run.json").read_text())["recipe"]["lora_rank"] == 4
    table = sage("llm", "engine", "list").stdout
    assert engine in table
    assert "100%" in table
    metrics = httpx.get(f"{url()}/metrics").text
    assert 'sage_engines{kind="finetune",state="completed"} 1.0' in metrics
    assert 'sage_device_memory_total_bytes{index="0",kind="cpu"' in metrics
    assert "completed" in httpx.get(f"{url()}/v1/management/engines/{engine}/events").text
    run = Path(list_engines()[engine]["run_dir"])
    assert "1 engine would be deleted" in sage("llm", "engine", "prune", "--older-than", "0", "--dry-run").stderr
    assert run.is_dir()
    assert engine in sage("llm", "engine", "prune", "--older-than", "0").stdout
    assert (run.exists(), list_engines()) == (False, {})
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_finetune_engine_works_from_python_without_a_gateway(tiny_model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        engine = FinetuneEngine(FinetuneEngineConfig(str(tiny_model), str(SAMPLES), str(tmp_path / "out"), num_epochs=9))
        assert engine.status == "not_started"
        with pytest.raises(Conflict, match="was not started"):
            await engine.get_status()
        started = await engine.start()
        assert started["task_id"] == engine.task_id
        assert started["status"] == "starting"
        while (await engine.get_status())["step"] < 2:
            await asyncio.sleep(0.05)
        stopped = await engine.stop()
        assert stopped["status"] == "stopped"
        assert 0 < stopped["progress"] < 1
        assert stopped["loss"] > 0
        assert any("stopped at step" in line for line in await engine.get_logs(5))
        assert (await engine.stop())["status"] == "stopped"
        assert engine.status == "stopped"

    asyncio.run(main())
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_the_async_client_starts_follows_and_removes_an_engine(tiny_model: Path, tmp_path: Path) -> None:
    sage("gateway", "start")

    async def main() -> None:
        async with AsyncSageClient(url()) as client:
            assert (await client.health())["status"] == "ok"
            options = {"dataset_path": str(SAMPLES), "output_dir": str(tmp_path / "out"), "max_steps": 3}
            engine = await client.start_engine(model=str(tiny_model), engine_kind="finetune", options=options)
            lines = [line async for line in client.follow_logs(engine.id)]
            assert any("step 3/3" in line for line in lines)
            states = [event.after async for event in client.follow_events(engine.id)]
            assert states == ["validating", "queued", "starting", "running", "completed"]
            assert [e.id for e in await client.list_engines()] == [engine.id]
            assert (await client.get_logs(engine.id, tail=1)) == lines[-1:]
            assert (await client.stop_engine(engine.id)).state == "completed"
            with pytest.raises(Conflict):
                await client.resume_engine(engine.id)
            await client.remove_engine(engine.id)
            assert await client.list_engines() == []
            assert await client.models() == []
            assert (await client.devices())[-1].kind == "cpu"

    asyncio.run(main())


def test_if_a_key_is_set_requests_without_it_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    done = sage("gateway", "start", "--host", "0.0.0.0", check=3)
    assert "Set SAGE_API_KEY" in done.stderr
    monkeypatch.setenv("SAGE_API_KEY", "secret")
    sage("gateway", "start", "--host", "0.0.0.0")
    assert httpx.get(f"{url()}/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url()}/health").status_code == 200
    assert httpx.get(f"{url()}/v1/models", headers={"Authorization": "Bearer secret"}).json()["data"] == []
    monkeypatch.delenv("SAGE_API_KEY")
    assert list_engines() == {}  # the command line on this machine finds the key


def test_a_request_with_a_foreign_host_name_gets_a_403() -> None:
    sage("gateway", "start")
    assert httpx.get(f"{url()}/health", headers={"Host": "evil.example"}).status_code == 403


def test_only_one_gateway_runs_and_the_commands_find_it() -> None:
    first = sage("gateway", "start").stdout
    assert "The gateway is running (PID" in first
    assert "is already running" in sage("gateway", "start").stdout
    assert "url" in sage("gateway", "status").stdout
    assert "startup complete" in sage("gateway", "logs").stdout
    assert "stopped" in sage("gateway", "stop").stdout
    assert "No gateway was running" in sage("gateway", "stop").stdout
    assert "does not answer" in sage("gateway", "status", check=3).stderr
    other = str(free_port())
    sage("gateway", "start", "--port", other)
    assert json.loads(sage("gateway", "status", "--json").stdout)["url"].endswith(other)


def test_an_engine_whose_launch_was_not_recorded_is_adopted(tiny_model: Path, sage_home: Path) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model)))
    before = list_engines()[engine]
    kill_gateway()
    with sqlite3.connect(sage_home / "state/engines.db") as database:  # restore the state before the launch
        database.execute("UPDATE engines SET state = 'starting', served_as = NULL")
        database.execute("UPDATE servers SET state = 'planned', address = NULL")
    sage("gateway", "start")
    wait_for(lambda: list_engines()[engine]["state"] == "running", "the adoption")
    after = list_engines()[engine]
    assert (after["pid"], after["port"]) == (before["pid"], before["port"])
