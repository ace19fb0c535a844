"""Adapters that are merged in the background while the server of their base answers."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from llama_cpp import link_backend
from served_adapters import HELLO, greedy, make_lora
from serving import HostingBackend, answered, make_adapter, run, start, started, until
from support import engine_of, list_engines, sage, wait_for

from sage.common.errors import ConfigError
from sage.llm.client.types import EngineState, EngineView
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.choice import MERGED_SPEEDS
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState
MERGED = "merged in the background"


@pytest.fixture
def hosting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "hosting", HostingBackend())
    monkeypatch.setitem(MERGED_SPEEDS["cpu"], "hosting", 9.0)  # type: ignore[index]
    for name, value in (("RECONCILE", 0.02), ("STOP", 20)):
        monkeypatch.setenv(f"SAGE_{name}_SECONDS", str(value))


async def seen(manager: ControlPlaneManager, engine_id: str, is_true: Callable[[EngineView], bool]) -> EngineView:
    deadline = time.monotonic() + 60
    while not is_true(view := await manager.get_engine(engine_id)):
        assert time.monotonic() < deadline, view
        await asyncio.sleep(0.01)
    return view


async def engines(manager: ControlPlaneManager, number: int) -> list[EngineView]:
    deadline = time.monotonic() + 60
    while len(found := await manager.list_engines()) != number:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)
    return found


@pytest.mark.usefixtures("hosting")
@pytest.mark.parametrize("has_base", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_engine_keeps_its_id_and_answers_every_request_while_it_moves_to_the_server_of_its_merged_model(
    tiny_model: Path, tmp_path: Path, has_base: bool
) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_model)

    async def test(manager: ControlPlaneManager) -> None:
        if has_base:
            await started(manager, tiny_model, name="base")
        tuned = await started(manager, adapter, name="tuned", merge_in_background=True, options={"start_seconds": 0.3})
        assert (tuned.form or "").startswith("adapter on server-")
        before = asyncio.create_task(seen(manager, tuned.id, lambda view: view.form == MERGED))
        while not before.done():
            assert await answered(manager, "tuned") == str(adapter)
        merged = await before
        assert (merged.state, merged.server_id != tuned.server_id, merged.restarts) == (S.RUNNING, True, 0)
        assert await answered(manager, tuned.id) == str(adapter)
        await engines(manager, 2 if has_base else 1)  # the engine that merged the adapter is removed
        assert await answered(manager, "tuned") == str(adapter)
        assert tuned.pid
        if has_base:
            assert await answered(manager, "base") == str(tiny_model)
        else:
            await seen(manager, tuned.id, lambda _: not _lives(tuned.pid))
        await manager.stop_engine(tuned.id)
        await until(manager, tuned.id, S.STOPPED)
        await manager.resume_engine(tuned.id)
        resumed = await until(manager, tuned.id, S.RUNNING)
        assert (resumed.form or "").startswith("merged")

    run(test)


@pytest.mark.usefixtures("hosting")
def test_stopping_an_engine_before_its_adapter_is_merged_also_stops_the_merge(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_model)

    async def test(manager: ControlPlaneManager) -> None:
        tuned = await started(manager, adapter, merge_in_background=True)
        await engines(manager, 2)
        await manager.stop_engine(tuned.id)
        await until(manager, tuned.id, S.STOPPED)
        await engines(manager, 1)

    run(test)


@pytest.mark.usefixtures("hosting")
def test_an_adapter_that_cannot_be_merged_keeps_answering_and_its_form_names_the_reason(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(MERGED_SPEEDS["cpu"], "hosting")  # type: ignore[arg-type]
    adapter = make_adapter(tmp_path / "a", tiny_model)  # transformers refuses the adapter's weights

    async def test(manager: ControlPlaneManager) -> None:
        tuned = await started(manager, adapter, name="tuned", merge_in_background=True)
        failed = await seen(manager, tuned.id, lambda view: "could not be merged" in (view.form or ""))
        assert failed.form
        assert failed.form.startswith(f"adapter on {tuned.server_id}; it could not be merged in the background: ")
        assert "sage llm engine logs engine-" in failed.form
        assert await answered(manager, "tuned") == str(adapter)

    run(test)


@pytest.mark.usefixtures("hosting")
def test_a_merge_in_the_background_is_refused_if_other_options_contradict_it(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_model)

    async def test(manager: ControlPlaneManager) -> None:
        wrong: list[tuple[Path, dict[str, Any], str]] = [
            (tiny_model, {}, "is not an adapter"),
            (adapter, {"dedicated": True}, "merged before"),
            (adapter, {"port": 9999}, "another port"),
            (adapter, {"engine_kind": "finetune", "backend": "auto"}, "not for a training run"),
        ]
        for model, fields, problem in wrong:
            with pytest.raises(ConfigError, match=problem) as caught:
                await start(manager, model, merge_in_background=True, **fields)
            assert caught.value.param == "merge_in_background"
        assert await manager.list_engines() == []

    run(test)


def _lives(pid: int | None) -> bool:
    return pid is not None and psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.long
@pytest.mark.parametrize("backend", ["transformers", "llamacpp"])
def test_the_merged_model_takes_over_with_the_same_answers_and_no_request_fails(
    tiny_model: Path, tmp_path: Path, sage_home: Path, backend: str
) -> None:
    if backend != "transformers":
        link_backend(backend, sage_home)
    sage("gateway", "start")
    base_url = f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}/v1"
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    adapter = make_lora(tiny_model, tmp_path / "a", seed=1)
    expected, answers, is_done = greedy(tiny_model, adapter), list[str | None](), threading.Event()

    def ask() -> None:
        while not is_done.is_set():
            try:
                answer = client.chat.completions.create(model="tuned", messages=HELLO, temperature=0, max_tokens=24)  # type: ignore[arg-type]
                answers.append(answer.choices[0].message.content)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                answers.append(f"{error!r}")

    engine = engine_of(sage("llm", "engine", "start", str(adapter), "--name", "tuned", "--merge-in-background",
                            "--dtype", "fp32"))  # fmt: skip
    first = list_engines()[engine]
    assert first["form"].startswith("adapter on server-")
    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        wait_for(lambda: list_engines()[engine]["form"] == MERGED, "the merged model")
        number = len(answers)
        wait_for(lambda: len(answers) > number + 5 and len(list_engines()) == 1, "the end of the merger")
    finally:
        is_done.set()
        for thread in asking:
            thread.join()
    assert set(answers) == {expected}
    merged = list_engines()[engine]
    assert (merged["backend"], merged["state"]) == (backend, "running")
    assert merged["context_tokens"] == first["context_tokens"]
    assert not _lives(first["pid"])
