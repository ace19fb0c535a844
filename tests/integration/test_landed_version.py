"""The current version takes over the processes and runs of an earlier version from the repository's history."""

import os
from pathlib import Path

import pytest
from landed import LandedGateway, install, losses
from support import free_port, list_engines, sage, wait_for

from sage.llm.client import SageClient

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
COMMIT = "19fceff"


def test_engines_of_an_earlier_version_are_adopted_and_its_runs_resume_bit_for_bit(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    landed = LandedGateway(install(COMMIT, tmp_path / "landed"), sage_home, free_port())
    try:
        whole = landed.train(tiny_model, tmp_path / "whole")
        landed.until(whole, "completed")
        part = landed.train(tiny_model, tmp_path / "part")
        landed.stop_after(part, 1)
        training = landed.train(tiny_model, tmp_path / "training", max_steps=100_000)
        served = landed.start(tiny_model)
        pids = {engine: landed.until(engine, "running")["pid"] for engine in (training, served)}
    finally:
        landed.kill()

    sage("gateway", "start")
    url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}"
    wait_for(lambda: all(list_engines()[engine]["pid"] == pid for engine, pid in pids.items()), "the adoption")
    engines = list_engines()
    assert {engine: engines[engine]["state"] for engine in pids} == {training: "running", served: "running"}
    with SageClient(url) as client:
        answer = client.chat(served, [{"role": "user", "content": "Hello"}], max_tokens=4)
    assert isinstance(answer, str)

    sage("llm", "engine", "resume", part, "--wait")
    assert losses(sage_home, engines[part]["task_id"]) == losses(sage_home, engines[whole]["task_id"])
    for engine in (training, served):
        sage("llm", "engine", "stop", engine)
        wait_for(lambda engine=engine: list_engines()[engine]["state"] == "stopped", "the end of an adopted engine")
    sage("gateway", "stop")
