"""Answers are generated in batches: the logits equal the model's own, and no answer changes or delays another answer."""

import asyncio
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from decoders import FAMILIES, SIZES
from fastapi import FastAPI
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)
from workers import Server, asked_at_once, error_of, post

from sage.llm.workers import generation
from sage.llm.workers.batch import Batch
from sage.llm.workers.generator import Generator
from sage.llm.workers.packed import PackedRunner, Part
from sage.llm.workers.runners import runner_for
from sage.llm.workers.sequential import SequentialRunner

#: Models that cannot be packed, because of their attention, their state space layers, or positions that depend on the batch.
SEQUENTIAL: dict[str, Callable[[], PreTrainedConfig]] = {
    "soft caps": lambda: Gemma2Config(**SIZES, sliding_window=40),
    "sinks": lambda: GptOssConfig(**{**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 40}),
    "ALiBi": lambda: FalconConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "states": lambda: MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2),
    "states and attention": lambda: JambaConfig(
        **SIZES, num_experts=2, use_mamba_kernels=False, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1
    ),
    "dynamic positions": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
}
LENGTHS = (1, 7, 90, 200)


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of one plain forward pass: (tokens, vocab_size)."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_pass_gives_the_same_logits_as_separate_passes(family: str) -> None:
    model = model_of(FAMILIES[family]())
    expected = [own_logits(model, ids) for ids in prompts()]
    runner = runner_for(model)
    assert isinstance(runner, PackedRunner)
    caches = [runner.new_cache(len(ids)) for ids in prompts()]
    found: list[list[torch.Tensor]] = [[] for _ in caches]
    with torch.inference_mode():
        step = 0
        while unread := [at for at, ids in enumerate(prompts()) if caches[at].length < len(ids)]:
            step += 1  # the parts have different lengths, and some are single tokens
            parts = [
                Part(caches[at], prompts()[at][caches[at].length :][: (1, 30, 64)[(at + step) % 3]], wants_all_logits=True)
                for at in unread
            ]
            for at, logits in zip(unread, runner.run(parts, lambda: None), strict=True):
                found[at].append(logits)
    for own, logits in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.cat(logits), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SEQUENTIAL)
def test_a_model_that_cannot_be_packed_runs_sequentially_with_the_same_logits(kind: str) -> None:
    model = model_of(SEQUENTIAL[kind]())
    ids = prompts()[-1]
    expected = own_logits(model, ids)
    runner = runner_for(model)
    assert isinstance(runner, SequentialRunner)
    cache, read = runner.new_cache(len(ids)), min(runner.prompt_tokens, len(ids) - 3)
    with torch.inference_mode():
        cuts = [ids[:read], *[[token] for token in ids[read:]]]
        found = torch.cat([runner.run([Part(cache, cut, wants_all_logits=True)], lambda: None)[0] for cut in cuts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(str(tiny_model), "fp32")


@pytest.fixture
def app(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(generation, "Generator", lambda *_: generator)
    return generation.build("tiny", "fp32", 8, slots=6)


def requests() -> list[dict[str, Any]]:
    """Return requests of all kinds. There are more requests than slots."""
    plain = [{"prompt": "SAGE trains models. " * times, "max_tokens": 5 + 7 * times} for times in (1, 3, 9, 2)]
    return [
        *plain,
        {"prompt": "Once", "temperature": 1, "seed": 3, "top_p": 0.8, "n": 2, "max_tokens": 20},
        {"prompt": "Once", "temperature": 2, "seed": 3, "top_k": 9, "logprobs": 2, "echo": True},
        {"prompt": ["Hello", "World"], "frequency_penalty": 1.5, "repetition_penalty": 1.2, "logit_bias": {"300": 2}},
        {"prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 1},
    ]


def test_an_answer_is_the_same_in_a_batch_and_alone(app: FastAPI) -> None:
    defaults = {"model": "m", "temperature": 0, "max_tokens": 12}
    bodies = [{**defaults, **body} for body in requests()]
    alone = [Server(app).post("/v1/completions", body).json() for body in bodies]
    together = asked_at_once(app, "/v1/completions", bodies)
    for one, other in zip(alone, together, strict=True):
        assert [choice["text"] for choice in one["choices"]] == [choice["text"] for choice in other["choices"]]
        assert one["usage"] == other["usage"]
        if scores := one["choices"][0]["logprobs"]:
            found = other["choices"][0]["logprobs"]["token_logprobs"]
            assert found[1:] == pytest.approx(scores["token_logprobs"][1:], abs=1e-4)


def test_a_long_prompt_is_read_in_parts_while_other_answers_are_generated(
    app: FastAPI, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []
    run, submit, all_arrived, arrivals = generator.runner.run, Batch.submit, threading.Event(), count(1)

    def counted(batch: Batch, *request: Any) -> None:
        submit(batch, *request)
        if next(arrivals) == 3:
            all_arrived.set()

    monkeypatch.setattr(Batch, "submit", counted)

    def recorded(parts: list[Part], check: Callable[[], None]) -> Any:
        all_arrived.wait(60)
        passes.append([len(part.tokens) for part in parts])
        return run(parts, check)

    monkeypatch.setattr(generator.runner, "run", recorded)
    monkeypatch.setattr(generator.runner, "prompt_tokens", 16)
    asked_at_once(
        app, "/v1/completions", [{"model": "m", "prompt": [300] * length, "max_tokens": 20} for length in (3, 250, 5)]
    )
    reading = [lengths for lengths in passes if 16 in lengths or max(lengths) > 3]
    assert all(sum(length for length in lengths if length > 1) <= 16 for lengths in passes)
    assert sum(lengths.count(1) for lengths in reading) >= 15  # at least one short request got tokens meanwhile


def test_slots_limit_the_number_of_answers_in_progress(
    app: FastAPI, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, run = 0, generator.runner.run

    def counted(parts: list[Part], check: Callable[[], None]) -> Any:
        nonlocal most
        most = max(most, len(parts))
        return run(parts, check)

    monkeypatch.setattr(generator.runner, "run", counted)
    asked_at_once(app, "/v1/completions", [{"model": "m", "prompt": "Hello", "n": 15, "temperature": 0}])
    assert most == 6


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x")], ids=repr)
def test_an_answer_that_fails_does_not_affect_other_answers(
    app: FastAPI, generator: Generator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bad, run = [333] * 20, generator.runner.run
    bodies = [{"model": "m", "prompt": [300 + at] * 10, "max_tokens": 15, "temperature": 0} for at in range(4)]
    expected = asked_at_once(app, "/v1/completions", bodies)

    def failing(parts: list[Part], check: Callable[[], None]) -> Any:
        if any(part.tokens == bad for part in parts):
            raise error
        return run(parts, check)

    monkeypatch.setattr(generator.runner, "run", failing)
    found = asked_at_once(app, "/v1/completions", [*bodies, {"model": "m", "prompt": bad}])
    assert [one["choices"][0]["text"] for one in found[:-1]] == [one["choices"][0]["text"] for one in expected]
    assert found[-1]["error"]["code"] == ("out_of_memory" if isinstance(error, MemoryError) else "internal_error")


def test_if_the_thread_of_the_model_has_ended_requests_get_status_500_and_the_server_is_not_healthy(
    app: FastAPI, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def health() -> int:
        async def ask() -> int:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                return (await client.get("/health")).status_code

        return asyncio.run(ask())

    assert health() == 200
    monkeypatch.setattr(generator.runner, "new_cache", lambda _: 1 // 0)
    for _ in range(2):
        assert error_of(Server(app).chat(), 500)["code"] == "internal_error"
    assert health() == 500


def test_a_short_answer_ends_before_a_long_answer_that_began_first(app: FastAPI, generator: Generator) -> None:
    has_begun = threading.Event()
    hook = generator.model.register_forward_hook(lambda *_: has_begun.set())
    ended: list[int] = []

    async def scenario() -> None:
        async def ask(tokens: int) -> None:
            body = {"model": "m", "prompt": "Hello", "max_tokens": tokens, "logit_bias": {"2": -100}}
            await post(app, "/v1/completions", body)
            ended.append(tokens)

        long = asyncio.ensure_future(ask(400))
        await asyncio.to_thread(has_begun.wait, 60)
        await ask(3)
        await long

    asyncio.run(scenario())
    hook.remove()
    assert ended == [3, 400]
