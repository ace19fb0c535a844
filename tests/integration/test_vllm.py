"""vLLM engines of SmolLM2-135M behind a real gateway, compared with transformers and PEFT. Needs vLLM's environment."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from engines import server
from llama_cpp import greedy_answer, link_backend, trained_model
from support import HELDOUT, sage, wait_for

from sage.libs.models.chat import ChatFormat
from sage.libs.models.loading import load_tokenizer, local_folder
from sage.libs.models.resolve import resolve_model
from sage.llm.client import SageClient
from sage.llm.client.types import EngineView
from sage.llm.control_plane.executors.sleep_client import SleepClient
from sage.llm.control_plane.inventory.gpus import gpu_memory_of, has_gpu

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800), pytest.mark.usefixtures("_vllm")]
_ANSWER_TOKENS = 16
#: Minimum share of equal answers. vLLM's kernels sum in another order than torch's, so nearly equal logits may swap.
_EQUAL_SHARE = 0.9


@pytest.fixture
def _vllm(sage_home: Path) -> None:
    link_backend("vllm", sage_home)


@pytest.fixture
def base() -> Path:
    return local_folder(resolve_model("smollm2-135m-instruct"))


@pytest.fixture
def client(sage_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SageClient]:
    monkeypatch.setenv("SAGE_ENGINE_START_SECONDS", "900")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "900")  # vLLM is slow if other programs use the cores
    sage("gateway", "start")
    yield SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}", timeout_seconds=600)
    sage("gateway", "stop", check=None)


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=5e-3)
    model.save_pretrained(folder)
    return folder


def started(client: SageClient, model: Path, **more: Any) -> EngineView:
    options = {"dtype": "fp32", "threads": 1}
    engine = client.start_engine(model=str(model), name=model.name, backend="vllm", options=options, **more)
    return until_running(client, engine.id)


def until_running(client: SageClient, engine_id: str) -> EngineView:
    wait_for(lambda: client.get_engine(engine_id).state in ("running", "failed"), "running or failed", 900)
    engine = client.get_engine(engine_id)
    assert engine.state == "running", engine.reason
    return engine


def questions() -> list[str]:
    chats = [json.loads(line)["messages"] for line in HELDOUT.read_text().splitlines()]
    asked = [message["content"] for chat in chats for message in chat if message["role"] == "user"]
    return (asked * 10)[:10]


def test_adapters_give_nearly_always_the_same_answers_as_transformers_and_peft(
    base: Path, tmp_path: Path, client: SageClient
) -> None:
    adapters = [make_adapter(base, tmp_path / f"adapter-{seed}", seed) for seed in range(2)]
    dora = make_adapter(base, tmp_path / "dora", 3, use_dora=True)
    server = started(client, base)
    for adapter in adapters:
        assert started(client, adapter).pid == server.pid
    own = started(client, dora)
    assert own.pid != server.pid
    assert "use_dora" in str(own.form)
    chat_format, equal = ChatFormat(load_tokenizer(base)), 0
    for adapter in (*adapters, dora):
        model = trained_model(base, adapter)
        for question in questions():
            messages = [{"role": "user", "content": question}]
            body = {"model": adapter.name, "messages": messages, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
            answer = httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=600).json()
            assert answer.get("model") == adapter.name, answer
            assert answer["usage"]["prompt_tokens"] == len(chat_format.prompt_ids(messages))
            expected = greedy_answer(model, chat_format, messages, _ANSWER_TOKENS)
            equal += answer["choices"][0]["message"]["content"] == expected
    metrics = httpx.get(f"{client.base_url}/metrics", timeout=60).text
    counts = dict(re.findall(r'^sage_engine_completion_tokens_total\{engine="([^"]+)".*\} (.+)$', metrics, re.MULTILINE))
    served = {engine.name: float(counts[engine.id]) for engine in client.list_engines()}
    limit = len(questions()) * _ANSWER_TOKENS + 1  # when an adapter is loaded, one more request generates one token
    assert all(0 < served[adapter.name] <= limit for adapter in (*adapters, dora)), served
    share = equal / 3 / len(questions())
    print(f"{share:.0%} of the answers are equal")
    assert share >= _EQUAL_SHARE


def test_a_server_sleeps_and_wakes_when_the_control_plane_requests_this(base: Path, client: SageClient) -> None:
    engine = started(client, base)
    host = server(id=engine.server_id, address=engine.address)

    async def sleep_and_wake() -> None:
        await SleepClient().sleep(host)
        await SleepClient().wake(host)

    asyncio.run(sleep_and_wake())
    assert greedy(client, engine)


@pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU, and vLLM cannot release its memory on a CPU")
def test_an_engine_that_frees_gpu_memory_for_another_engine_sleeps_and_gives_the_same_answer_later(
    base: Path, tmp_path: Path, client: SageClient
) -> None:
    engine = started(client, make_adapter(base, tmp_path / "tuned", 1))
    before, answer = gpu_memory_of(engine.pid or 0), greedy(client, engine)
    limit_gb = max(device.memory_total_bytes for device in client.devices() if device.kind == "cuda") / 1e9
    other = client.start_engine(model=str(base), name="other", on_busy="preempt", dedicated=True, memory_gb=limit_gb - 4)
    wait_for(lambda: client.get_engine(engine.id).state == "paused", "paused", 120)
    after = gpu_memory_of(engine.pid or 0)
    assert before
    assert after
    assert after < before - 10**9  # the KV cache alone uses more than 1 GB
    client.stop_engine(other.id)
    assert until_running(client, engine.id).pid == engine.pid
    assert greedy(client, engine) == answer


def greedy(client: SageClient, engine: EngineView) -> str:
    body = {"model": engine.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{client.base_url}/v1/chat/completions", json=body, timeout=600)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_server_killed_in_the_middle_of_a_stream_ends_it_with_an_error_and_comes_back(
    base: Path, client: SageClient
) -> None:
    engine = started(client, base, restart_policy="on-failure")
    body = {"model": engine.name, "messages": [{"role": "user", "content": "Hello"}]}
    long = {**body, "max_tokens": 4000, "stream": True, "logit_bias": {"0": -100, "2": -100}}
    with httpx.stream("POST", f"{client.base_url}/v1/chat/completions", json=long, timeout=600) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        assert "error" not in json.loads(next(lines))
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        *_, last = lines
    assert "error" in json.loads(last)
    wait_for(lambda: client.get_engine(engine.id).pid not in (None, engine.pid), "another process", 300)
    pid = until_running(client, engine.id).pid
    assert pid
    answer = httpx.post(f"{client.base_url}/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=600)
    assert answer.status_code == 200
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    sage("llm", "engine", "stop", engine.id, "--force")
    wait_for(lambda: not any(map(psutil.pid_exists, family)), "the end of all processes")
