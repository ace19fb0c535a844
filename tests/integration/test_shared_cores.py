"""CPU threads of engines, with the real command line, gateway, trainer and model server."""

from pathlib import Path

import psutil
import pytest
from support import SAMPLES, engine_of, sage, wait_for

from sage.cli.daemon import find_client
from sage.common.cgroups import available_cores


@pytest.mark.long
def test_an_engine_that_starts_while_another_engine_runs_gets_half_of_the_cores(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    served = engine_of(sage("llm", "engine", "start", str(tiny_model), "--name", "tiny"))
    options = ("--dataset", str(SAMPLES), "--output", str(tmp_path / "out"), "--max-steps", "1000000")
    run = engine_of(sage("llm", "engine", "start", str(tiny_model), "--engine-kind", "finetune", *options))
    client = find_client()
    assert client.get_engine(served).threads == available_cores()
    share = max(1, available_cores() // 2)
    for engine, threads in ((served, available_cores()), (run, share)):
        view = client.get_engine(engine)
        assert view.threads == threads
        assert psutil.Process(view.pid).environ()["OMP_NUM_THREADS"] == str(threads)
    left = max(1, available_cores() - share)  # the server changes its threads when it answers a request
    ask = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    wait_for(lambda: client.chat("tiny", **ask) is not None and client.get_engine(served).threads == left, "the change")
    assert f"threads            {share}" in sage("llm", "engine", "status", run).stdout
    sage("llm", "engine", "stop", "--force", run)
