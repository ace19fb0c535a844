"""Adapters on the server of their base model, tested with a real gateway and real inference servers."""

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from served_adapters import HELLO, greedy, make_lora
from support import engine_of, list_engines, sage

from sage.llm.client import AsyncSageClient
from sage.llm.client.types import SETTLED, EngineState


@pytest.fixture
def client() -> openai.OpenAI:
    sage("gateway", "start")
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


@pytest.mark.long
def test_an_adapter_on_the_server_of_its_base_gives_the_same_answers_as_peft(
    tiny_model: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    folders = [make_lora(tiny_model, tmp_path / f"a{seed}", seed) for seed in range(2)]
    dora = make_lora(tiny_model, tmp_path / "dora", 5, use_dora=True)

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
    assert own["form"] == "merged, because the adapter uses use_dora"
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


def copies(adapter: Path, folder: Path, count: int) -> list[Path]:
    """Create copies of an adapter, each with other random weights, and return their folders."""
    weights = load_file(adapter / "adapter_model.safetensors")
    for number in range(count):
        copy = folder / f"a{number}"
        copy.mkdir()
        (copy / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        torch.manual_seed(number)
        changed = {name: torch.randn_like(weight) * 0.3 for name, weight in weights.items()}
        save_file(changed, copy / "adapter_model.safetensors")
    return [folder / f"a{number}" for number in range(count)]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_thirty_adapters_answer_from_one_server_while_some_of_them_are_stopped_and_started(
    tiny_model: Path, tmp_path: Path, client: openai.OpenAI
) -> None:
    folders = copies(make_lora(tiny_model, tmp_path / "first", 1), tmp_path, 30)
    expected = {folder.name: greedy(tiny_model, folder) for folder in folders}
    loading_seconds, first_seconds = [], []
    is_over = False

    async def running(sage_client: AsyncSageClient, folder: Path) -> str:
        engine = await sage_client.start_engine(model=str(folder), name=folder.name)
        while (state := (await sage_client.get_engine(engine.id)).state) is not EngineState.RUNNING:
            assert state not in SETTLED
            await asyncio.sleep(0.01)
        return engine.id

    async def ask(asked: openai.AsyncOpenAI, name: str, tokens: int = 24) -> str:
        answer = await asked.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=tokens)  # type: ignore[arg-type]
        assert answer.model == name
        return answer.choices[0].message.content or ""

    async def keep_asking(asked: openai.AsyncOpenAI, name: str) -> int:
        count = 0
        while not is_over:
            assert await ask(asked, name) == expected[name]
            count += 1
        return count

    async def test() -> None:
        nonlocal is_over
        base_url = str(client.base_url)
        asked = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
        async with AsyncSageClient(base_url.removesuffix("/v1/")) as sage_client:
            await running(sage_client, tiny_model)
            engines = {folder.name: await running(sage_client, folder) for folder in folders}
            pids = {(await sage_client.get_engine(engine)).pid for engine in engines.values()}
            assert len(pids) == 1
            assert await asyncio.gather(*(ask(asked, name) for name in expected)) == list(expected.values())
            asking = [asyncio.create_task(keep_asking(asked, folder.name)) for folder in folders[:8]]
            for number in range(100):
                folder = folders[8 + number % 22]
                await sage_client.stop_engine(engines[folder.name])
                begin = time.monotonic()
                engines[folder.name] = await running(sage_client, folder)
                loading_seconds.append(time.monotonic() - begin)
                await ask(asked, folder.name, tokens=1)
                first_seconds.append(time.monotonic() - begin - loading_seconds[-1])
            is_over = True
            assert all(await asyncio.gather(*asking))
            assert await asyncio.gather(*(ask(asked, name) for name in expected)) == list(expected.values())

    asyncio.run(test())
    for what, seconds in (("loading", loading_seconds), ("first token after it", first_seconds)):
        points = statistics.quantiles(seconds, n=100)
        print(f"{what}: p50 {points[49]:.3f} s, p99 {points[98]:.3f} s")
