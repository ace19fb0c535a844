"""Engines with the backend llamacpp behind a real gateway. Their answers are compared with the answers of transformers."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from llama_cpp import greedy_answer, trained_model
from support import sage, wait_for
from tiny_engines import ask, start, until
from training import TinyRun
from workers import HELLO

from sage.libs.models.chat import ChatFormat
from sage.libs.models.export.exporting import export_model
from sage.libs.models.export.formats import ExportFormat, LlamaCpp
from sage.libs.models.loading import load_tokenizer
from sage.llm.client import SageClient

pytestmark = pytest.mark.usefixtures("llama_cpp")


@pytest.fixture
def client(sage_home: Path) -> Iterator[SageClient]:
    sage("gateway", "start")
    yield SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")
    sage("gateway", "stop", "--force", check=None)


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return TinyRun(tiny_model, tmp_path / "trained", learning_rate=3e-2, max_steps=12).trained().output


def test_an_adapter_is_served_merged_and_answers_as_with_transformers(
    tiny_model: Path, adapter: Path, client: SageClient
) -> None:
    engine = client.get_engine(start(client, adapter, "llamacpp", slots=3, context_tokens=256))
    assert (engine.slots, engine.context_tokens) == (3, 256)
    assert engine.form == "merged, because the backend 'llamacpp' cannot load adapters into a running server"
    model, chat_format = trained_model(tiny_model, adapter), ChatFormat(load_tokenizer(adapter))
    for question in ("Hello", "What is SAGE?", "1 2 3"):
        messages = [{"role": "user", "content": question}]
        answer = ask(client, messages=messages).json()
        assert answer["usage"]["prompt_tokens"] == len(chat_format.prompt_ids(messages))
        assert answer["choices"][0]["message"]["content"] == greedy_answer(model, chat_format, messages, 16)
    metrics = httpx.get(f"{client.base_url}/metrics", timeout=60).text
    [completion] = re.findall(r"^sage_engine_completion_tokens_total\{.*\} (.+)$", metrics, re.MULTILINE)
    assert float(completion) > 0
    without_key = httpx.post(f"http://{engine.address}/v1/chat/completions", json={"messages": HELLO}, timeout=60)
    assert without_key.status_code == 401
    refused = ask(client, repetition_penalty=1.5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "repetition_penalty")


@pytest.mark.long
def test_a_quantized_engine_names_its_quantization_in_its_form(adapter: Path, client: SageClient) -> None:
    engine = client.get_engine(start(client, adapter, "llamacpp", quantize="int8", context_tokens=256))
    assert engine.form
    assert engine.form.startswith("merged, int8, because")
    assert ask(client).status_code == 200


@pytest.mark.long
def test_a_server_killed_in_the_middle_of_a_stream_ends_it_with_an_error_and_comes_back(
    tiny_model: Path, tmp_path: Path, client: SageClient
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))  # for a long answer
    engine_id = start(client, model, "llamacpp")
    pid = client.get_engine(engine_id).pid
    assert pid
    never_end = {str(token): -100 for token in range(3)}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8000, "stream": True, "logit_bias": never_end}
    with httpx.stream("POST", f"{client.base_url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        assert "error" not in json.loads(next(lines))
        os.kill(pid, signal.SIGKILL)
        *_, last = lines
    assert json.loads(last)["error"]["code"] == "engine_died"
    wait_for(lambda: client.get_engine(engine_id).pid not in (None, pid), "another process")
    until(client, engine_id, "running")
    assert ask(client).status_code == 200
    pid = client.get_engine(engine_id).pid
    assert pid
    sage("llm", "engine", "stop", engine_id, "--force")
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the end of the server")


@pytest.mark.long
def test_a_gguf_file_is_served_without_conversion(
    tiny_model: Path, tmp_path: Path, sage_home: Path, client: SageClient, llama_cpp: LlamaCpp
) -> None:
    export_model(str(tiny_model), ExportFormat.GGUF, tmp_path / "out", precision="q8_0", llama_cpp=llama_cpp)
    start(client, tmp_path / "out", "llamacpp")
    assert ask(client).status_code == 200
    assert not (sage_home / "cache" / "gguf").exists()
    too_long = ask(client, messages=[{"role": "user", "content": "word " * 2000}])
    assert (too_long.status_code, "context size (512 tokens)" in too_long.text) == (400, True)


@pytest.mark.long
def test_a_model_that_llama_cpp_does_not_support_fails_with_the_reason(
    tiny_model: Path, tmp_path: Path, client: SageClient
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_start|>system", "{{ strftime_now('%f') }}"))
    engine = client.start_engine(model=str(folder), backend="llamacpp", restart_policy="no")
    until(client, engine.id, "failed")
    reason = client.get_engine(engine.id).reason
    assert reason
    assert "tokenizes a prompt differently" in reason.message
