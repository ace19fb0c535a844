"""Inference servers with real models, in this process: parameters, log probabilities, failures, disconnecting clients."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import HELLO, Client, Server, check_document, error_of, events_of, text_of

from sage.common.errors import ModelError
from sage.libs.models.chat import ChatFormat
from sage.llm.workers import generation
from sage.llm.workers.generator import Generator
from sage.llm.workers.text import TextDecoder
from sage.llm.workers.voice import rendered

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(str(tiny_model), "fp32")


@pytest.fixture
def server(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(generation, "Generator", lambda *_: generator)
    return Server(generation.build("tiny", "fp32", 8))


def reference_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the log probabilities that transformers computes for each next token, with the shape (tokens, vocab_size)."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def test_a_streamed_answer_equals_the_answer_without_streaming(server: Server) -> None:
    for seed in range(4):
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 40}
        for ask, said in ((server.chat, "delta"), (server.complete, None)):
            chunks = events_of(ask(stream=True, stream_options={"include_usage": True}, **options))
            choices = [chunk["choices"][0] for chunk in chunks[:-1]]
            pieces = [choice[said].get("content", "") if said else choice["text"] for choice in choices]
            whole = ask(**options)
            assert "".join(pieces) == text_of(whole)
            assert len([piece for piece in pieces if piece]) > 3
            assert choices[-1]["finish_reason"] == whole.json()["choices"][0]["finish_reason"]
            assert chunks[-1]["usage"] == whole.json()["usage"]


def test_the_number_of_threads_changes_between_passes_and_the_server_reports_it(server: Server) -> None:
    health = server.app.state.about()
    assert (health["threads"], health["is_active"]) == (torch.get_num_threads(), False)
    before = text_of(server.chat())
    for threads in (2, 1):
        assert server.post("/v1/threads", {"threads": threads}).status_code == 200
        about = server.app.state.about()
        assert (about["threads"], about["is_active"]) == (threads, True)
        assert text_of(server.chat()) == before
    assert error_of(server.post("/v1/threads", {"threads": 0}))["param"] == "threads"


def test_a_prompt_is_scored_as_the_model_itself_scores_it(
    server: Server, generator: Generator, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.runner, "prompt_tokens", 16)  # the prompt is read in several parts
    ids = AutoTokenizer.from_pretrained(tiny_model)("SAGE trains and serves models. " * 6)["input_ids"]
    reference = reference_logprobs(tiny_model, ids)
    answer = server.complete(prompt=ids, echo=True, max_tokens=0, logprobs=3)
    scores, text = answer.json()["choices"][0]["logprobs"], text_of(answer)
    assert text == "SAGE trains and serves models. " * 6
    assert answer.json()["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    expected = reference[torch.arange(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(torch.tensor(scores["token_logprobs"][1:]).double(), expected, atol=1e-5, rtol=0)
    best = reference.max(dim=-1).values[:-1].tolist()
    assert [max(top.values()) for top in scores["top_logprobs"][1:]] == pytest.approx(best, abs=1e-5)
    assert all(3 <= len(top) <= 4 and token in top for top, token in
               zip(scores["top_logprobs"][1:], scores["tokens"][1:], strict=True))  # fmt: skip
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert text[offset:].startswith(token)


@pytest.mark.parametrize("temperature", [0, 1.7])
def test_an_answer_is_scored_before_temperature_and_penalties(server: Server, tiny_model: Path, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 3, "max_tokens": 12, "frequency_penalty": 2, "logit_bias": {"300": 5}}
    answer = server.chat(logprobs=True, top_logprobs=2, **options).json()["choices"][0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    scored = answer["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in scored).decode(errors="replace") == answer["message"]["content"]
    first = reference_logprobs(tiny_model, prompt)[-1]
    assert [one["logprob"] for one in scored[0]["top_logprobs"]] == pytest.approx(first.topk(2).values.tolist(), abs=1e-5)
    streamed = events_of(server.chat(logprobs=True, top_logprobs=2, stream=True, **options))
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [one for piece in pieces if piece for one in piece["content"]] == scored


def test_an_echoed_prompt_and_its_answer_are_one_text(server: Server) -> None:
    alone = server.complete(logprobs=0).json()["choices"][0]
    echoed = server.complete(logprobs=0, echo=True).json()["choices"][0]
    assert echoed["text"] == "Hello" + alone["text"]
    count = len(alone["logprobs"]["tokens"])
    assert echoed["logprobs"]["token_logprobs"][-count:] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-5)
    assert echoed["logprobs"]["text_offset"][-count:] == [5 + offset for offset in alone["logprobs"]["text_offset"]]
    assert text_of(server.complete(echo=True)) == echoed["text"]


def test_token_ids_are_used_unchanged(server: Server, tiny_model: Path) -> None:
    ids = AutoTokenizer.from_pretrained(tiny_model)("Hello")["input_ids"]
    assert text_of(server.complete(prompt=ids)) == text_of(server.complete(prompt=[ids])) == text_of(server.complete())


def test_several_prompts_and_choices_are_answered_in_order(server: Server) -> None:
    both = server.complete(prompt=["Hello", "SAGE"], n=2).json()
    alone = [text_of(server.complete(prompt=prompt)) for prompt in ("Hello", "SAGE")]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert both["usage"]["completion_tokens"] == 32
    sampled = server.chat(n=2, temperature=1, seed=5).json()["choices"]
    assert sampled[0]["message"] != sampled[1]["message"]
    streamed = events_of(server.chat(n=2, temperature=1, seed=5, stream=True))
    for choice in sampled:
        own = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "length"


def test_penalties_biases_and_filters_choose_the_tokens(server: Server) -> None:
    def tokens(**more: Any) -> list[str]:
        chosen: list[str] = server.complete(logprobs=0, **more).json()["choices"][0]["logprobs"]["tokens"]
        return chosen

    assert len(set(tokens(logit_bias={"300": 100}))) == 1
    favourite = tokens(logit_bias={"300": 1.5})
    assert len(set(favourite)) == 1
    for more in ({"frequency_penalty": 2}, {"presence_penalty": 2}):
        assert tokens(logit_bias={"300": 1.5}, **more)[:2] != favourite[:2]
    assert favourite[0] not in tokens(logit_bias={"300": -100})
    for more in ({"temperature": 1e-40}, {"top_k": 1}, {"min_p": 1}, {"top_p": 1e-9}):
        assert tokens(**{"temperature": 2, "seed": 1, **more}) == tokens()
    sampled = [tokens(temperature=2, seed=1, **more) for more in ({}, {"top_k": 0}, {"top_k": -1}, {"top_k": 5})]
    assert sampled[0] == sampled[1] == sampled[2] != sampled[3]


def test_a_repetition_penalty_has_the_same_effect_as_in_transformers(
    server: Server, generator: Generator, tiny_model: Path
) -> None:
    prompt = [300, 301, 302, 303]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.8)
    expected = TextDecoder(generator.voice.tokenizer, prompt)
    text = "".join([*map(expected.push, ids[0, len(prompt) :].tolist()), expected.flush()])
    assert text_of(server.complete(prompt=prompt, repetition_penalty=1.8)) == text
    assert text_of(server.complete(prompt=prompt)) != text


def test_answers_with_the_same_seed_are_equal_and_answers_without_a_seed_differ(server: Server) -> None:
    def sample(**more: Any) -> str:
        return text_of(server.complete(temperature=1, max_tokens=16, **more))

    for seed in (-(2**63), -1, 7, 2**63 - 1):
        assert sample(seed=seed) == sample(seed=seed)
    after_seed = [(sample(seed=7), sample())[1] for _ in range(2)]
    assert after_seed[0] != after_seed[1]
    assert error_of(server.chat(seed=2**64))["param"] == "seed"


def test_a_stop_string_that_spans_two_tokens_ends_the_text_and_the_log_probabilities(server: Server) -> None:
    whole = server.complete(logprobs=0).json()["choices"][0]
    text, offsets = whole["text"], whole["logprobs"]["text_offset"]
    stop = next(text[at - 1 : at + 1] for at in offsets if 1 < at < len(text))
    cut = server.complete(logprobs=0, stop=["never", stop]).json()["choices"][0]
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "invalid_value"), ([10**6], "invalid_value"), ([1] * 513, "context_length_exceeded"),
        ("word " * 2000, "context_length_exceeded"), ("a" * 10**6, "context_length_exceeded"),
    ],
    ids=["empty", "unknown token", "ids too long", "text too long", "too many characters"],
)  # fmt: skip
def test_an_empty_invalid_or_too_long_prompt_is_refused(server: Server, prompt: Any, code: str) -> None:
    for stream in (False, True):
        error = error_of(server.complete(prompt=prompt, stream=stream))
        assert (error["code"], error["param"]) == (code, "prompt")


@pytest.mark.usefixtures("server")  # build() then uses the loaded model
def test_an_answer_that_needs_more_than_the_whole_cache_is_refused_with_the_numbers() -> None:
    server = Server(generation.build("tiny", "fp32", 8, cache_tokens=20))
    assert server.complete(prompt=[300] * 12).status_code == 200
    error = error_of(server.complete(prompt=[300] * 13))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert (
        "has 13 tokens, and the answer can have 8, but the engine's key/value cache has space for only 20"
        in error["message"]
    )
    assert server.complete(prompt=[300] * 13, max_tokens=7).status_code == 200


def test_a_prompt_can_fill_the_context_to_the_last_token(server: Server) -> None:
    full = server.complete(prompt=[300] * 511).json()
    assert full["usage"]["completion_tokens"] == 1
    assert full["choices"][0]["finish_reason"] in ("length", "stop")
    assert error_of(server.complete(prompt=[300] * 512))["code"] == "context_length_exceeded"
    assert server.complete(prompt=[300] * 512, max_tokens=0, echo=True).status_code == 200
    assert error_of(server.complete(logit_bias={"600": 1}))["param"] == "logit_bias"


def test_tools_are_refused_if_the_chat_template_does_not_support_tools(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(server.chat(tools=TOOLS))
    assert (error["code"], error["param"]) == ("unsupported_value", "tools")
    assert server.chat(tools=TOOLS, tool_choice="none").status_code == 200
    tokenizer = generator.voice.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools }}" + tokenizer.chat_template)
    assert server.chat(tools=TOOLS).status_code == 200


def test_a_template_that_never_ends_is_stopped(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with monkeypatch.context() as patched:
        patched.setattr("sage.llm.workers.voice.RENDER_SECONDS", 0.2)
        patched.setattr(generator.voice.tokenizer, "chat_template", endless)
        assert error_of(server.chat())["code"] == "template_too_slow"
        with pytest.raises(ModelError, match="did not finish"):
            rendered(lambda: ChatFormat(generator.voice.tokenizer).end_ids(None))
    assert server.chat().status_code == 200


def fail_after(generator: Generator, tokens: int, error: BaseException) -> Callable[..., Any]:
    """Return a `forward` that computes as many calls as `tokens` and then raises `error`."""
    forward, calls = generator.model.forward, 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > tokens:
            raise error
        return forward(*arguments, **options)

    return failing


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("x"), 500), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 503),
        (MemoryError(), 503), (torch.OutOfMemoryError("x"), 503), (SystemExit(1), 500),
    ],
    ids=repr,
)  # fmt: skip
def test_an_engine_continues_to_answer_after_any_error_of_a_generation(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    for stream in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(generator.model, "forward", fail_after(generator, 0, error))
            error_of(server.chat(stream=stream), status)
        with monkeypatch.context() as patched:
            patched.setattr(generator.model, "forward", fail_after(generator, 4, error))
            answer = server.chat(stream=stream)
        if stream:
            chunks = events_of(answer)
            assert "error" in chunks[-1]
            assert "[DONE]" not in answer.text
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
        else:
            error_of(answer, status)
    assert server.chat().status_code == 200


def test_no_answer_is_computed_for_a_queued_request_whose_client_has_disconnected(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = generation.build("tiny", "fp32", 8, slots=1)
    queued, limits, runner = [0], list[int](), generator.runner
    check, new_cache, may_go_on = generator.voice.check_prompt, runner.new_cache, threading.Event()

    def checked(*arguments: Any) -> None:
        queued[0] += 1
        check(*arguments)

    def counted(limit_tokens: int) -> Any:
        limits.append(limit_tokens)
        return new_cache(limit_tokens)

    monkeypatch.setattr(generator.voice, "check_prompt", checked)
    monkeypatch.setattr(runner, "new_cache", counted)
    hook = generator.model.register_forward_pre_hook(lambda *_: may_go_on.wait(60) and None)

    async def scenario() -> Client:
        first = Client(app, max_tokens=3)
        impatient = [Client(app, max_tokens=400, stream=index % 2 == 0) for index in range(5)]
        last = Client(app, max_tokens=2)
        while queued[0] < 7:
            await asyncio.sleep(0)
        for client in impatient:
            await client.leave()
        may_go_on.set()
        await asyncio.gather(first.task, last.task)
        return last

    last = asyncio.run(scenario())
    hook.remove()
    assert len(limits) == 2
    assert limits[0] - limits[1] == 1
    assert json.loads(last.sent[-1]["body"])["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_disconnects(
    server: Server, generator: Generator, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    has_begun, layers_passed = threading.Event(), 0
    monkeypatch.setattr(generator, "context_tokens", 10**9)

    def pass_layer(*_: Any) -> None:
        nonlocal layers_passed
        layers_passed += 1
        has_begun.set()

    hook = generator.model.model.layers[0].register_forward_pre_hook(pass_layer)

    async def scenario() -> None:
        endless = Client(server.app, max_tokens=10**8, stream=stream, logit_bias={"0": -100, "2": -100})
        await asyncio.to_thread(has_begun.wait, 60)
        if stream:
            await endless.answered.wait()
        await endless.leave()
        await Client(server.app, max_tokens=1).task

    asyncio.run(scenario())
    hook.remove()
    assert layers_passed < 10_000


def test_the_openapi_document_describes_the_requests(server: Server) -> None:
    check_document(server.app)
