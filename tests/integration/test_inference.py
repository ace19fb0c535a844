"""Engines answer requests that OpenAI's own client sends through a real gateway."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from chat_templates import CHATML
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from support import engine_of, free_port, list_engines, sage, wait_for
from training import TinyRun
from transformers import AutoModelForCausalLM, AutoTokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def base_url() -> str:
    sage("gateway", "start")
    return f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}"


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)


def peft_greedy(base: Path, adapter: Path | None, count: int) -> str:
    """Return the greedy answer of transformers, or of PEFT if an adapter is given."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_openai_s_own_client_works(tiny_model: Path, client: openai.OpenAI) -> None:
    sage("llm", "engine", "start", str(tiny_model), "--name", "tiny")
    sage("llm", "engine", "start", "all-minilm-l6-v2", "--engine-kind", "embedding")
    assert {model.id for model in client.models.list()} == {"tiny", "all-minilm-l6-v2", "sage-default"}
    assert client.models.retrieve("tiny").object == "model"

    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
    text = peft_greedy(tiny_model, None, 12)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.model) == (12, "tiny")

    chunks = list(client.chat.completions.create(
        model="sage-default", messages=HELLO, temperature=0, max_completion_tokens=12, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12

    stop = next(piece for piece in text.split(" ") if len(piece) > 2)
    cut = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"

    sampled = [client.completions.create(model="tiny", prompt="Once", seed=7, max_tokens=8, top_p=0.9).choices[0].text
               for _ in range(2)]  # fmt: skip
    assert sampled[0] == sampled[1]
    assert sampled[0] != client.completions.create(model="tiny", prompt="Once", seed=8, max_tokens=8).choices[0].text

    vectors = client.embeddings.create(model="all-minilm-l6-v2", input=["a cat", "a kitten", "the stock market"])
    cat, kitten, market = (torch.tensor(item.embedding) for item in vectors.data)
    assert cat.shape == (384,)
    assert cat @ kitten > 0.7 > cat @ market
    floats = client.embeddings.create(model="all-minilm-l6-v2", input="a cat", encoding_format="float")
    torch.testing.assert_close(torch.tensor(floats.data[0].embedding), cat, rtol=1e-4, atol=1e-5)

    with pytest.raises(openai.NotFoundError, match="available engines: tiny") as not_found:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    for wrong in ({"temperature": 9}, {"n": 0}, {"top_logprobs": 3}, {"max_tokens": 0}, {"extra_body": {"guided_json": {}}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=HELLO, **wrong)  # type: ignore[call-overload]
        assert refused.value.param in (*wrong, "guided_json")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 600}], stream=True)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="all-minilm-l6-v2", input="a", dimensions=385)
    with pytest.raises(openai.BadRequestError, match="not valid JSON"):
        client.post("/chat/completions", cast_to=object, content=b"{")
    with pytest.raises(openai.BadRequestError, match="'model' is required"):
        client.post("/chat/completions", cast_to=object, body={"messages": HELLO})

    said = sage("llm", "chat", "tiny", "--message", "Hello", "--temperature", "0", "--max-tokens", "12").stdout
    assert said == text + "\n"
    talk = "Hello\n/clear\n\nHello\n/exit\n"
    said = sage("llm", "chat", "--temperature", "0", "--max-tokens", "12", input=talk).stdout
    assert said == f"{text}\n{text}\n"


class Verdict(BaseModel):
    """A verdict."""

    ok: bool
    size: Literal["s", "m"]


def test_openai_s_own_client_gets_tool_calls_and_parsed_answers(
    tiny_model: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    model = tmp_path / "with-tools"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(CHATML)
    sage("llm", "engine", "start", str(model), "--name", "tools")
    tool = openai.pydantic_function_tool(Verdict, name="judge")
    asked: dict[str, Any] = {"model": "tools", "messages": HELLO, "temperature": 0, "max_tokens": 200}

    parsed = client.chat.completions.parse(**asked, response_format=Verdict).choices[0]
    assert isinstance(parsed.message.parsed, Verdict)
    called = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[
        0
    ]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls is not None
    (call,) = called.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Verdict)
    with client.chat.completions.stream(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.tool_calls is not None
    assert streamed.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
    results = [
        called.message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "content": "5", "tool_call_id": call.id},
    ]
    for message in results[0]["tool_calls"]:
        message["function"].pop("parsed_arguments")
    assert client.chat.completions.create(**{**asked, "messages": [*HELLO, *results]}, tools=[tool]).choices


def test_a_request_waits_for_a_starting_engine_and_gets_a_503_after_the_time_limit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_REQUEST_WAIT_SECONDS", "0.1")
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--no-wait"))
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1"
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError) as told:
        client.chat.completions.create(model=engine, messages=HELLO)
    assert told.value.status_code == 503
    assert int(told.value.response.headers["Retry-After"]) > 0
    sage("gateway", "stop")
    monkeypatch.setenv("SAGE_REQUEST_WAIT_SECONDS", "60")
    sage("gateway", "start")
    assert client.chat.completions.create(model=engine, messages=HELLO, max_tokens=1).choices


@pytest.mark.long
def test_a_killed_engine_fails_with_a_reason_and_can_be_resumed(tiny_model: Path, client: openai.OpenAI) -> None:
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model)))
    client.chat.completions.create(model=engine, messages=HELLO, max_tokens=1)
    os.kill(list_engines()[engine]["pid"], signal.SIGKILL)
    wait_for(lambda: list_engines()[engine]["state"] == "failed", "the failure", seconds=5)
    assert "was killed by SIGKILL" in list_engines()[engine]["reason"]["message"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=engine, messages=HELLO)
    sage("llm", "engine", "resume", engine)
    client.chat.completions.create(model=engine, messages=HELLO, max_tokens=1)
    assert "is stopped" in sage("llm", "engine", "stop", engine).stdout
    assert "was already stopped" in sage("llm", "engine", "stop", engine).stdout
    events = sage("llm", "engine", "events", engine).stdout
    assert events.count("→ running") == 2
    sage("llm", "engine", "remove", engine)
    assert list_engines() == {}


def test_the_command_fails_with_the_reason_if_a_model_cannot_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no_such_architecture"}))
    done = sage("llm", "engine", "start", str(broken), check=1)
    assert "cannot be loaded" in done.stderr
    assert "no_such_architecture" in done.stderr


def test_served_adapters_of_sage_and_of_peft_give_the_same_answers_as_peft(
    tiny_model: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    ours = TinyRun(tiny_model, tmp_path / "ours", max_steps=40).trained().output
    torch.manual_seed(1)
    trained: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    theirs = tmp_path / "theirs"
    trained.save_pretrained(theirs)
    base_answer = peft_greedy(tiny_model, None, 24)
    for adapter in (ours, theirs):
        engine = engine_of(sage("llm", "engine", "start", str(adapter)))
        served = client.chat.completions.create(model=engine, messages=HELLO, temperature=0, max_tokens=24)
        assert served.choices[0].message.content == peft_greedy(tiny_model, adapter, 24)
        assert served.choices[0].message.content != base_answer
        sage("llm", "engine", "stop", engine)
    # transformers loads our adapter if only the adapter's folder is given.
    plain = AutoModelForCausalLM.from_pretrained(ours)
    assert any("lora" in name for name, _ in plain.named_parameters())


def test_the_slot_of_a_client_that_disconnects_becomes_free(tiny_model: Path, base_url: str) -> None:
    sage("llm", "engine", "start", str(tiny_model), "--name", "tiny")
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 450, "temperature": 0, "stream": True}
    for _ in range(20):
        with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
    plain = {**body, "stream": False}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base_url}/v1/chat/completions", json=plain, timeout=0.05)
    done = httpx.post(f"{base_url}/v1/chat/completions", json={**plain, "max_tokens": 2}, timeout=60)
    assert done.json()["usage"]["completion_tokens"] == 2


def test_more_requests_at_once_than_the_server_has_threads_are_all_answered(tiny_model: Path, base_url: str) -> None:
    sage("llm", "engine", "start", str(tiny_model), "--name", "tiny")
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            url = f"{base_url}/v1/chat/completions"
            return await asyncio.gather(*(client.post(url, json={**body, "stream": n % 2 == 0}) for n in range(60)))

    assert [answer.status_code for answer in asyncio.run(ask_all())] == [200] * 60


def test_an_engine_gets_the_requested_port_or_an_error_if_the_port_is_in_use(tiny_model: Path) -> None:
    port = free_port()
    engine = engine_of(sage("llm", "engine", "start", str(tiny_model), "--port", str(port)))
    assert list_engines()[engine]["port"] == port
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    done = sage("llm", "engine", "start", str(tiny_model), "--port", str(port), check=1)
    assert f"Port {port} cannot be used: Address already in use" in done.stderr
    assert done.stdout == ""
    assert len(list_engines()) == 1
