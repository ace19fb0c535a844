"""OpenVINO: exports, and engines with a real gateway and a real server; transformers computes the expected answers."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from greedy import NEAR_TIE, adapter_on, lead_where_they_differ
from llama_cpp import greedy_answer, link_backend, trained_model
from support import sage, wait_for
from tiny_engines import ask, start, until
from training import TinyRun
from transformers import MistralConfig, MistralForCausalLM
from workers import HELLO

from sage.common.errors import ModelError
from sage.libs.models.chat import ChatFormat
from sage.libs.models.export.exporting import export_model
from sage.libs.models.export.formats import ExportFormat, OpenVino
from sage.libs.models.loading import load_tokenizer, local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client import SageClient
from sage.llm.control_plane.backends import environments

PROMPTS = [f"What is {a} and {b}?" for a in range(5) for b in range(6)]
#: Program that reads prompts and prints the answers of OpenVINO GenAI; the argument is the folder of the model.
_PROGRAM = """
import json, sys, openvino_genai
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
answers = [str(pipeline.generate(p, max_new_tokens=24, do_sample=False)) for p in json.load(sys.stdin)]
print(json.dumps(answers))
"""


@pytest.fixture(autouse=True)
def open_vino(sage_home: Path) -> OpenVino:
    """Return the installed environment. It is too large for `make test` (550 MB), so the tests are skipped without it."""
    link_backend("openvino", sage_home)
    return OpenVino(Path(environments.interpreter("openvino")))


@pytest.fixture
def client(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SageClient]:
    monkeypatch.setenv("SAGE_ENGINE_START_SECONDS", "1200")
    sage("gateway", "start")
    yield SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")
    sage("gateway", "stop", "--force", check=None)


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return TinyRun(tiny_model, tmp_path / "trained", learning_rate=3e-2, max_steps=12).trained().output


def test_an_exported_adapter_answers_in_openvino_genai_as_with_transformers(
    tiny_model: Path, adapter: Path, tmp_path: Path, open_vino: OpenVino
) -> None:
    # The export also compares the tokens and the logits with those of transformers.
    export_model(str(adapter), ExportFormat.OPENVINO, tmp_path / "out", open_vino=open_vino)
    argv = [open_vino.interpreter, "-c", _PROGRAM, tmp_path / "out"]
    done = subprocess.run(argv, input=json.dumps(PROMPTS), capture_output=True, text=True, check=True)
    model, chat_format = trained_model(tiny_model, adapter), ChatFormat(load_tokenizer(adapter))
    for prompt, answer in zip(PROMPTS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert answer == greedy_answer(model, chat_format, [{"role": "user", "content": prompt}], 24)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_export_is_smaller(quantize: str, tiny_model: Path, tmp_path: Path, open_vino: OpenVino) -> None:
    export_model(str(tiny_model), ExportFormat.OPENVINO, tmp_path / "out", precision=quantize, open_vino=open_vino)
    size = (tmp_path / "out" / "openvino_model.bin").stat().st_size
    assert size < (tiny_model / "model.safetensors").stat().st_size / 3


def test_a_model_whose_attention_has_a_sliding_window_is_refused(
    tiny_model: Path, tmp_path: Path, open_vino: OpenVino
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = MistralConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=64)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="its attention has a sliding window") as caught:
        export_model(str(folder), ExportFormat.OPENVINO, tmp_path / "out", open_vino=open_vino)
    assert caught.value.code == "export_unsupported"
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_served_merged_and_answers_as_with_transformers(
    tiny_model: Path, adapter: Path, client: SageClient
) -> None:
    engine = client.get_engine(start(client, adapter, "openvino", slots=3, context_tokens=256))
    assert (engine.slots, engine.context_tokens) == (3, 256)
    assert engine.form
    assert engine.form.startswith("merged, because")
    model, chat_format = trained_model(tiny_model, adapter), ChatFormat(load_tokenizer(adapter))

    def answered(prompt: str) -> Any:
        return ask(client, messages=[{"role": "user", "content": prompt}]).json()

    with ThreadPoolExecutor(8) as pool:  # more requests than slots
        answers = list(pool.map(answered, PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        messages = [{"role": "user", "content": prompt}]
        assert answer["usage"]["prompt_tokens"] == len(chat_format.prompt_ids(messages))
        assert answer["choices"][0]["message"]["content"] == greedy_answer(model, chat_format, messages, 16)
    refused = ask(client, mirostat=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mirostat")
    too_long = ask(client, messages=[{"role": "user", "content": "word " * 300}])
    assert (too_long.status_code, "context has 256" in too_long.text) == (400, True)
    same = [ask(client, temperature=1.5, seed=7).json()["choices"][0]["message"]["content"] for _ in range(2)]
    assert same[0] == same[1]
    never_end = {str(token): -100 for token in range(3)}
    scored = ask(client, logprobs=True, top_logprobs=2, logit_bias=never_end).json()["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in scored)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_smollm2_with_a_merged_adapter_answers_as_with_transformers(tmp_path: Path, client: SageClient) -> None:
    base = local_folder(resolve_model("smollm2-135m-instruct"))
    adapter = adapter_on(base, tmp_path / "adapter", 1)
    start(client, adapter, "openvino", 1200)
    model, chat_format = trained_model(base, adapter), ChatFormat(load_tokenizer(base))
    leads = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        answer = ask(client, messages=messages, max_tokens=32).json()["choices"][0]["message"]["content"]
        leads.append(lead_where_they_differ(model, chat_format.tokenizer, chat_format.prompt_ids(messages), answer, 32))
    found = [lead for lead in leads if lead is not None]
    print(f"{len(found)} of {len(PROMPTS)} answers differ, where the two largest logits differ by {found}")
    assert all(lead < NEAR_TIE for lead in found)


def test_a_quantized_engine_names_its_quantization_in_its_form(adapter: Path, client: SageClient) -> None:
    engine = client.get_engine(start(client, adapter, "openvino", quantize="int8"))
    assert engine.form
    assert engine.form.startswith("merged, int8, because")
    assert ask(client).status_code == 200


def test_a_client_that_disconnects_cancels_its_answer(tiny_model: Path, tmp_path: Path, client: SageClient) -> None:
    start(client, long_context(tiny_model, tmp_path), "openvino", slots=1)
    with httpx.stream("POST", f"{client.base_url}/v1/chat/completions", json=endless(), timeout=60) as stream:
        next(stream.iter_lines())
    assert ask(client).status_code == 200  # the only slot is free, long before the first answer could have ended


def test_a_server_killed_in_the_middle_of_a_stream_ends_it_with_an_error_and_comes_back(
    tiny_model: Path, tmp_path: Path, client: SageClient
) -> None:
    engine_id = start(client, long_context(tiny_model, tmp_path), "openvino")
    pid = client.get_engine(engine_id).pid
    assert pid
    with httpx.stream("POST", f"{client.base_url}/v1/chat/completions", json=endless(), timeout=60) as stream:
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


def long_context(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model whose context is long enough for an answer of 60,000 tokens."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65_536}))
    return model


def endless() -> dict[str, Any]:
    never_end = {str(token): -100 for token in range(3)}
    return {"model": "tiny", "messages": HELLO, "max_tokens": 60_000, "stream": True, "logit_bias": never_end}
