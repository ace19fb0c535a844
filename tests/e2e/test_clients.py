"""Third-party clients work unchanged with a real gateway. The tests install the clients into a separate environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML
from support import ROOT, sage

from sage.common.processes import held_lock

#: Not litellm 1.107.0, because this release was compromised.
REQUIREMENTS = (
    "dspy==3.4.1", "langchain-openai==1.7.4", "litellm==1.106.*", "llama-index-embeddings-openai-like==0.4.0",
    "llama-index-llms-openai-like==0.8.1",
)  # fmt: skip
CLIENTS = Path(__file__).parent / "clients"
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of the environment with the clients, which is created once and then reused."""
    folder = ROOT / ".clients"
    stamp = folder / "requirements.json"
    with held_lock(ROOT / ".clients.lock"):
        if not stamp.is_file() or json.loads(stamp.read_text()) != list(REQUIREMENTS):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
            stamp.write_text(json.dumps(REQUIREMENTS))
    return folder / "bin/python"


@pytest.fixture
def base_url(tiny_model: Path, tmp_path: Path) -> str:
    """The URL of a gateway that serves an embedding model and a model whose chat template supports tools."""
    model = tmp_path / "tools"
    shutil.copytree(tiny_model, model)
    template = CHATML.replace("<call>", "<tool_call>").replace("</call>", "</tool_call>")
    (model / "chat_template.jinja").write_text(template)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))  # DSPy's prompts are long
    sage("llm", "engine", "start", str(model), "--name", "tiny")
    sage("llm", "engine", "start", "all-minilm-l6-v2", "--engine-kind", "embedding", "--name", "minilm")
    return f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1"


def result_of(python: Path, client: str, base_url: str) -> dict[str, Any]:
    """Run the program of a client against the gateway, and return the JSON object that the program prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SAGE_"))}
    argv = [python, CLIENTS / f"{client}_client.py", base_url, "tiny", "minilm"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_langchain_chats_streams_calls_tools_and_gets_structured_output(python: Path, base_url: str) -> None:
    result = result_of(python, "langchain", base_url)
    assert result.pop("chat") == result.pop("stream") != ""
    assert len(set(result.pop("tokens"))) == 1
    assert result == {
        "call": ["now", ["zone"]], "streamed_call": ["now", ["zone"]], "after_the_call": True,
        "structured": [["ok", "size"], ["ok", "size"]], "dimensions": [384, 384],
    }  # fmt: skip


def test_llamaindex_chats_streams_calls_tools_and_gets_structured_output(python: Path, base_url: str) -> None:
    result = result_of(python, "llamaindex", base_url)
    assert result.pop("chat") == result.pop("stream") != ""
    assert result == {
        "completion": True, "call": ["now", ["zone"]], "structured": ["ok", "size"], "dimensions": [384, 384],
    }  # fmt: skip


def test_dspy_predicts_the_fields_of_a_signature(python: Path, base_url: str) -> None:
    result = result_of(python, "dspy", base_url)
    assert result.pop("chat")
    assert result == {"structured": ["bool", True], "stream": True, "dimensions": [384, 384]}
