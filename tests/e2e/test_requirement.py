"""The integration test that is part of SAGE's requirements."""

import json
import subprocess
from pathlib import Path

import pytest
from support import ROOT, list_engines, make_tiny_model, sage

SCRIPT = (ROOT / "tests/e2e/requirement.sh").read_text()
WAIT_FOR_THE_END = "until sage llm engine status $ENGINE_ID | grep -q 'state *completed'; do sleep 0.2; done"


@pytest.fixture
def qwen(sage_home: Path, tmp_path: Path) -> None:
    """Import a small random model with the name and the architecture of Qwen/Qwen2.5-0.5B-Instruct.

    The model is large enough that its training has not ended when the script lists and stops the run.
    """
    make_tiny_model(tmp_path / "qwen", width=384, layers=12)
    sage("llm", "model", "import", str(tmp_path / "qwen"), "--name", "Qwen/Qwen2.5-0.5B-Instruct")


@pytest.mark.timeout(700)
@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize(("between", "state"), [("", "stopped"), (WAIT_FOR_THE_END, "completed")])
def test_the_script_of_the_requirements_works_unchanged(clone: Path, between: str, state: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SCRIPT.replace("$BETWEEN", between)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listing, answer = done.stdout, json.loads(done.stdout.splitlines()[-1])
    assert "running" in listing
    assert "%" in listing
    assert "training: step 0 of 23" in listing
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"]
    trained, serving = list_engines().values()
    assert trained["state"] == state
    assert (trained["training"]["step"] == 23) == (state == "completed")
    assert (serving["kind"], serving["state"]) == ("llm", "running")
    assert (clone / "test_finetune/adapter_model.safetensors").is_file()
