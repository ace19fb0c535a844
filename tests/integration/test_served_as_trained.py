"""A served model has the held-out loss of its training run, and its answers end where the trained answers end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, set_family
from fastapi.testclient import TestClient
from support import make_tiny_model, write_jsonl
from training import TinyRun

from sage.libs.finetune.data.checking import load_encoder
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.tokenizing import IGNORED
from sage.libs.models.loading import load_tokenizer
from sage.llm.workers import generation

CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (("one?", "yes"), ("two?", "no\n\nnever"), ("日本?", "né 🦊"))
]
MULTI = [*CHATS[0], *CHATS[1]]
#: The chats in each dataset format.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "openai": [{"messages": chat} for chat in [*CHATS, MULTI]],
    "sharegpt": [
        {"conversations": [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in chat]}
        for chat in [*CHATS, MULTI]
    ],
    "alpaca": [{"instruction": chat[0]["content"], "output": chat[1]["content"]} for chat in CHATS],
    "prompt_completion": [{"prompt": chat[0]["content"], "completion": chat[1]["content"]} for chat in CHATS],
    "text": [{"text": f"{chat[0]['content']} {chat[1]['content']}"} for chat in CHATS],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "full": {"finetuning_type": "full", "learning_rate": 3e-3},
}
#: Options with which the tiny model learns the trained answers by heart.
BY_HEART = {"finetuning_type": "full", "learning_rate": 5e-3, "max_steps": 120, "lr_scheduler": "constant"}


def model_of(folder: Path, family: str, *, tied: bool = True) -> Path:
    """Make a tiny model with the chat template and the special tokens of a family."""
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder, tie_word_embeddings=tied)
    tokenizer = load_tokenizer(folder)
    set_family(tokenizer, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def served(model: Path) -> Iterator[TestClient]:
    with TestClient(generation.build(str(model), "fp32", 64), base_url="http://127.0.0.1") as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1{path}", json={"model": "m", **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def served_loss(client: TestClient, model: Path, dataset: Path) -> float:
    """Return the mean loss over the trained tokens, in nats, from the log-probabilities that the server returns."""
    encoder = load_encoder(str(model), 512)
    total, count = 0.0, 0
    for sample in read_samples(DatasetReport(dataset)):
        for sequence in encoder.encode_whole([sample])[0]:
            told = post(client, "/completions", prompt=sequence.ids, echo=True, logprobs=0, max_tokens=0)
            scores = told["choices"][0]["logprobs"]["token_logprobs"]
            assert len(scores) == len(sequence.ids)
            trained = [s for s, label in zip(scores[1:], sequence.labels[1:], strict=True) if label != IGNORED]
            total, count = total - sum(trained), count + len(trained)
    return total / count


def learnt(model: Path, tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> tuple[TinyRun, Path]:
    """Train on records; return the run and its dataset."""
    dataset = write_jsonl(tmp_path / "chats.jsonl", records)
    options = {"max_steps": 20, "learning_rate": 2e-2, "save_steps": 1000, **options}
    run = TinyRun(model, tmp_path / "out", dataset_path=str(dataset), eval_path=str(dataset), **options)
    return run.trained(), dataset


def check(run: TinyRun, dataset: Path, chats: list[list[dict[str, Any]]]) -> None:
    heldout_loss = run.run_file()["metrics"]["heldout_loss"]
    assert heldout_loss < run.run_file()["metrics"]["heldout_loss_before"]
    with served(run.output) as client:
        assert served_loss(client, run.output, dataset) == pytest.approx(heldout_loss, abs=1e-4)
        for chat in chats:
            told = post(client, "/chat/completions", messages=chat[:-1], temperature=0)["choices"][0]
            assert told["message"]["content"].strip().removeprefix("<think>\n\n</think>\n\n") == chat[-1]["content"]
            assert told["finish_reason"] == "stop"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_template_the_served_answers_equal_the_trained_answers_and_end(tmp_path: Path, family: str) -> None:
    run, dataset = learnt(model_of(tmp_path / "base", family), tmp_path, SHAPES["openai"], **BY_HEART)
    check(run, dataset, [*CHATS, MULTI])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "openai"])
def test_with_every_dataset_format_the_served_answers_equal_the_trained_answers(tmp_path: Path, shape: str) -> None:
    run, dataset = learnt(model_of(tmp_path / "base", "chatml"), tmp_path, SHAPES[shape], **BY_HEART)
    check(run, dataset, [] if shape == "text" else CHATS)
    if shape == "text":
        with served(run.output) as client:
            told = post(client, "/completions", prompt="one?", temperature=0)["choices"][0]
        assert (told["text"], told["finish_reason"]) == (" yes", "stop")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_every_kind_of_training_the_served_loss_equals_the_held_out_loss(
    tmp_path: Path, adapter: str, tied: bool
) -> None:
    model = model_of(tmp_path / "base", "chatml", tied=tied)
    run, dataset = learnt(model, tmp_path, SHAPES["openai"], **ADAPTERS[adapter])
    check(run, dataset, [])
