"""Adapters in the server of their base, through a real gateway, with the model's own server."""

import os
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import engine_of, list_engines, sage
from transformers import AutoModelForCausalLM, AutoTokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client() -> openai.OpenAI:
    sage("gateway", "start")
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


def greedy(base: Path, adapter: Path | None) -> str:
    """Return what transformers and PEFT answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_an_adapter_answers_from_the_server_of_its_base_as_peft_does(
    tiny_model: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    folders = [make_adapter(tiny_model, tmp_path / f"a{seed}", seed) for seed in range(2)]
    dora = make_adapter(tiny_model, tmp_path / "dora", 5, use_dora=True)

    def start(model: Path, *options: str) -> dict[str, Any]:
        engine = engine_of(sage("llm", "engine", "start", str(model), "--name", model.name, *options))
        return list_engines()[engine]

    def answer(name: str) -> str | None:
        answered = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=24)
        assert answered.model == name
        return answered.choices[0].message.content

    base = start(tiny_model)
    begin = time.monotonic()
    joined = [start(folder) for folder in folders]
    print(f"two adapters were loaded in {time.monotonic() - begin:.2f} s")
    own = start(dora)
    assert {engine["pid"] for engine in joined} == {base["pid"]} != {own["pid"]}
    assert own["form"] == "merged, since it uses use_dora"
    assert (base["slots"], base["context_tokens"]) == (16, 512)
    for folder in (*folders, dora):
        assert answer(folder.name) == greedy(tiny_model, folder)
    assert answer(tiny_model.name) == greedy(tiny_model, None) != answer("a0")
    dedicated = engine_of(sage("llm", "engine", "start", str(folders[0]), "--name", "alone", "--dedicated"))
    assert list_engines()[dedicated]["pid"] != base["pid"]
    assert answer("alone") == answer("a0")
    sage("llm", "engine", "stop", joined[0]["id"])
    with pytest.raises(openai.NotFoundError):
        answer("a0")
    sage("llm", "engine", "stop", base["id"])
    assert answer("a1") == greedy(tiny_model, folders[1])
    assert "adapter on" in sage("llm", "engine", "status", joined[1]["id"]).stdout
    sage("llm", "engine", "remove", base["id"])
    assert sage("llm", "engine", "logs", joined[1]["id"]).returncode == 0
    assert answer("a1") == greedy(tiny_model, folders[1])
