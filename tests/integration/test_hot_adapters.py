"""Adapters in a running base: their answers alone and in a mixed batch, how they are loaded and unloaded, and refusals."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from greedy import greedy_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, PreTrainedConfig, Qwen2MoeConfig
from workers import Client, Server, asked_at_once, error_of, post

from sage.libs.models.adapters import read_lora
from sage.llm.workers import generation
from sage.llm.workers.adapters import Adapter, Adapters
from sage.llm.workers.packed import PackedRunner, Part
from sage.llm.workers.runners import runner_for

QUESTIONS = ["Hello", "What is SAGE?", "Count to ten, then stop.", "日本?"]
TOKENS = 24
#: Adapters that a running base can load.
HOT: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "two layers, rank-stabilised": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 32},
        "target_modules": ["q_proj", "down_proj"],
    },
    "the second layer only": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
}
#: Adapters that need a merged copy of their base.
NOT_HOT: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "a head saved whole": {"modules_to_save": ["lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "biases": {"bias": "lora_only"},
    "trained tokens": {"trainable_token_indices": [3, 4]},
}


#: Models with layers whose inputs have no batch dimension.
FLAT: dict[str, tuple[PreTrainedConfig, list[str]]] = {
    "OPT": (OPTConfig(vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                      word_embed_proj_dim=32, max_position_embeddings=64), ["q_proj", "fc1", "fc2"]),
    "shared experts": (Qwen2MoeConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                      shared_expert_intermediate_size=16), ["down_proj"]),
}  # fmt: skip


def adapter_on(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Make an adapter with random weights that change the answers of the base model."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**defaults, **options}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


def chat(model: str, question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": TOKENS, **more}


def content_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def text_of_ids(base: Path, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(base).decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def app(tiny_model: Path) -> FastAPI:
    return generation.build(str(tiny_model), "fp32", 8, served_name="base")


@pytest.fixture
def load(app: FastAPI) -> Callable[..., httpx.Response]:
    def load(name: str, folder: Path) -> httpx.Response:
        return Server(app).post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    return load


def names_of(app: FastAPI) -> list[str]:
    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return (await client.get("/v1/models")).json()

    return [model["id"] for model in asyncio.run(ask())["data"]]


def unload(app: FastAPI, name: str) -> httpx.Response:
    return Server(app).post("/v1/unload_lora_adapter", {"lora_name": name})


@pytest.mark.parametrize("kind", HOT)
def test_a_loaded_adapter_answers_exactly_as_peft_does_alone_and_in_a_mixed_batch(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    adapter = adapter_on(tiny_model, tmp_path / "adapter", **HOT[kind])
    assert load("hot", adapter).status_code == 200
    bodies = [chat(name, question) for question in QUESTIONS for name in ("hot", "base")]
    alone = [asked_at_once(app, "/v1/chat/completions", [body])[0] for body in bodies]
    mixed = asked_at_once(app, "/v1/chat/completions", bodies)
    folders = {"hot": adapter, "base": None}
    wanted = [
        text_of_ids(tiny_model, greedy_tokens(tiny_model, folders[name], question, TOKENS))
        for question in QUESTIONS for name in ("hot", "base")
    ]  # fmt: skip
    assert [content_of(answer) for answer in alone] == wanted
    assert [content_of(answer) for answer in mixed] == wanted
    assert wanted[0] != wanted[1]
    assert unload(app, "hot").status_code == 200


@pytest.mark.parametrize("kind", FLAT)
def test_adapters_on_layers_without_a_batch_dimension_compute_what_peft_computes(tmp_path: Path, kind: str) -> None:
    config, targets = FLAT[kind]
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    folder = adapter_on(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    base, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval() for _ in range(2))
    adapter, runner = Adapter(read_lora(base, folder)), runner_for(base)
    assert isinstance(runner, PackedRunner)
    with torch.inference_mode():
        runner.add(adapter)
        parts = [Part(runner.new_cache(9), list(range(5, 14)), adapter=owner) for owner in (adapter, None)]
        found = runner.run(parts, lambda: None)
        ids = torch.arange(5, 14)[None]
        plain = other(input_ids=ids).logits[0, -1]
        adapted = PeftModel.from_pretrained(other, folder).eval()(input_ids=ids).logits[0, -1]
    torch.testing.assert_close(found[0][-1], adapted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1][-1], plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_each_of_sixteen_adapters_in_one_batch_gives_its_own_answers(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path
) -> None:
    names = [f"adapter-{seed}" for seed in range(16)]
    for seed, name in enumerate(names):
        options = {
            "r": 2 + seed % 3,
            "target_modules": [["q_proj"], ["q_proj", "up_proj"], ["v_proj", "down_proj"]][seed % 3],
        }
        assert load(name, adapter_on(tiny_model, tmp_path / name, seed, **options)).status_code == 200
    assert names_of(app) == ["base", *names]
    bodies = [chat(name, question) for question in QUESTIONS[:2] for name in [*names, "base"]]
    found = asked_at_once(app, "/v1/chat/completions", bodies)
    for body, answer in zip(bodies, found, strict=True):
        folder = None if body["model"] == "base" else tmp_path / body["model"]
        wanted = greedy_tokens(tiny_model, folder, body["messages"][0]["content"], TOKENS)
        assert content_of(answer) == text_of_ids(tiny_model, wanted), body["model"]
        assert answer["model"] == body["model"]
    assert len({content_of(answer) for answer in found[:17]}) > 14  # the adapters differ
    for name in names:
        assert unload(app, name).status_code == 200
    assert names_of(app) == ["base"]


def test_answers_in_progress_end_before_their_adapter_is_unloaded(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path
) -> None:
    load("leaving", adapter_on(tiny_model, tmp_path / "adapter"))
    body = {"model": "leaving", "max_tokens": 200, "logit_bias": {"2": -100}}
    whole = Server(app).chat(**body).json()

    async def scenario() -> Client:
        answering = Client(app, **body, stream=True)
        await answering.answered.wait()
        unloaded = [post(app, "/v1/unload_lora_adapter", {"lora_name": "leaving"}) for _ in range(2)]
        codes = {answer.status_code for answer in await asyncio.gather(*unloaded)}
        assert codes in ({200}, {200, 404})  # 404: the answer had ended before the repeated request arrived
        assert error_of(await post(app, "/v1/chat/completions", chat("leaving", "Hello")), 404)["code"] == "model_not_found"
        await answering.task
        return answering

    sent = b"".join(message.get("body", b"") for message in asyncio.run(scenario()).sent).decode()
    chunks = [json.loads(event.removeprefix("data: ")) for event in sent.split("\n\n") if "{" in event]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 200


@pytest.mark.parametrize("kind", NOT_HOT)
def test_an_adapter_that_must_be_merged_is_refused_with_the_reason(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    adapter = adapter_on(tiny_model, tmp_path / "adapter", **NOT_HOT[kind])
    error = error_of(load("cold", adapter))
    assert (error["code"], error["param"]) == ("adapter_not_hot", "lora_path")
    assert names_of(app) == ["base"]


def test_an_adapter_that_does_not_fit_is_refused_and_the_server_continues(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path / "wide", width=64)
    adapter = adapter_on(tmp_path / "wide", tmp_path / "adapter")
    assert error_of(load("unfit", adapter))["code"] == "adapter_unfit"
    config = json.loads((adapter / "adapter_config.json").read_text())
    for folder in (tmp_path / "nothing", Path("relative"), tmp_path / "wide"):
        assert load("unfit", folder).status_code in (400, 404)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    assert load("unfit", adapter).status_code == 404
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    assert load("unfit", adapter).status_code == 400
    assert names_of(app) == ["base"]
    assert Server(app).post("/v1/chat/completions", chat("base", "Hello")).status_code == 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_weights_that_are_not_finite_is_refused(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path, value: float
) -> None:
    file = adapter_on(tiny_model, tmp_path / "adapter") / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = value
    save_file(weights, file)
    assert error_of(load("diverged", file.parent))["code"] == "adapter_not_finite"
    assert names_of(app) == ["base"]


def test_an_adapter_on_a_layer_that_receives_only_some_tokens_is_refused_with_the_reason(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Adapters.begin
    more = lambda self, adapters, lengths: begin(self, adapters, [2 * length for length in lengths])  # noqa: E731
    monkeypatch.setattr(Adapters, "begin", more)
    error = error_of(load("expert", adapter_on(tiny_model, tmp_path / "adapter", target_modules=["up_proj"])))
    assert error["code"] == "adapter_not_hot"
    assert "model.layers.0.mlp.up_proj does not receive every token" in error["message"]
    assert names_of(app) == ["base"]


def test_a_name_belongs_to_one_adapter_and_unknown_names_are_not_found(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path
) -> None:
    first, second = (adapter_on(tiny_model, tmp_path / str(seed), seed) for seed in (1, 2))
    assert [load("one", first).status_code for _ in range(2)] == [200, 200]
    assert error_of(load("one", second))["param"] == error_of(load("base", second))["param"] == "lora_name"
    assert error_of(unload(app, "two"), 404)["code"] == "model_not_found"
    assert error_of(unload(app, "base"), 404)["code"] == "model_not_found"
    assert error_of(Server(app).chat(model="two"), 404)["code"] == "model_not_found"
    assert unload(app, "one").status_code == 200


def test_an_adapter_uses_its_own_chat_template_and_its_own_end_token(
    app: FastAPI, load: Callable[..., httpx.Response], tiny_model: Path, tmp_path: Path
) -> None:
    adapter = adapter_on(tiny_model, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<|endoftext|>"
    tokenizer.save_pretrained(adapter)
    load("own", adapter)
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain)
    (plain / "tokenizer.json").unlink()
    load("plain", plain)
    lengths = [
        Server(app).post("/v1/chat/completions", chat(name, "Hello")).json()["usage"]["prompt_tokens"]
        for name in ("own", "plain", "base")
    ]
    assert lengths[0] == len(tokenizer("Hello<|endoftext|>")["input_ids"]) < lengths[1] == lengths[2]
    forced = chat("own", "Hello", logit_bias={str(tokenizer.convert_tokens_to_ids("<|endoftext|>")): 100})
    choice = Server(app).post("/v1/chat/completions", forced).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    for name in ("own", "plain"):
        unload(app, name)
