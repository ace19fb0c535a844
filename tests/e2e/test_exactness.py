"""Compare greedy answers of the real 135M model and its adapters with the answers of transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import NEAR_TIE, adapter_on, lead_where_they_differ
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workers import Server, asked_at_once

from sage.llm.workers import generation
from sage.llm.workers.generator import Generator

MODEL = "smollm2-135m-instruct"
TOKENS = 32
SUBJECTS = ("rain", "bread", "a river", "chess")
ASKED = ("Explain {} to a child.", "Write one line about {}.", "List three facts about {}.")
PROMPTS = [asked.format(subject) for subject in SUBJECTS for asked in ASKED]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(MODEL, "fp32")


@pytest.mark.long
def test_base_and_adapters_in_one_batch_answer_as_transformers_and_peft_do(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "Generator", lambda *_: generator)
    app = generation.build(MODEL, "fp32", TOKENS, served_name="base")
    folders = {name: adapter_on(generator.folder, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    for name, folder in folders.items():
        loaded = Server(app).post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        assert loaded.status_code == 200
    names = ("base", *folders)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [generator.voice.chat_prompt(chat, None) for chat in chats]
    bodies = [
        {"model": names[at % 3], "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        for at, prompt in enumerate(prompts)
    ]
    answers = asked_at_once(app, "/v1/completions", bodies)
    differences = []
    for name in names:
        model: Any = AutoModelForCausalLM.from_pretrained(generator.folder, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, folders[name])
        for prompt, body, answer in zip(prompts, bodies, answers, strict=True):
            if body["model"] == name:
                text = answer["choices"][0]["text"]
                differences.append(lead_where_they_differ(model, generator.voice.tokenizer, prompt, text, TOKENS))
    found = [lead for lead in differences if lead is not None]
    print(f"{len(found)} of {len(differences)} answers differ from PEFT's, by {found}")
    assert len({answer["choices"][0]["text"] for answer in answers}) == len(answers)
    assert all(lead < NEAR_TIE for lead in found)
    assert len(found) <= len(differences) // 10
