"""Engines without requests are unloaded, and loaded again at the next request. A small test server serves the models."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import HostingBackend, answered, make_adapter, run, started, until

from sage.common.settings import load_settings
from sage.llm.client.types import DesiredState, EngineState
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState
#: Stop after one idle second, so that the tests are short.
IDLE: dict[str, Any] = {"idle_stop_minutes": 1 / 60}


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "hosting", HostingBackend())
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0.02")


def test_an_idle_engine_is_unloaded_and_the_next_request_loads_it_and_waits(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, tiny_model, name="base", **IDLE)
        assert engine.idle_stop_minutes == IDLE["idle_stop_minutes"]
        paused = await until(manager, engine.id, S.PAUSED)
        assert (paused.desired, paused.pid, paused.address) == (DesiredState.PAUSED, None, None)
        assert paused.reason
        assert paused.reason.code == "idle"
        assert await answered(manager, "base") == str(tiny_model)
        assert (await manager.get_engine(engine.id)).desired is DesiredState.RUNNING
        await until(manager, engine.id, S.PAUSED)
        await manager.resume_engine(engine.id)
        await until(manager, engine.id, S.RUNNING)
        await until(manager, engine.id, S.PAUSED)
        await manager.stop_engine(engine.id)
        await until(manager, engine.id, S.STOPPED)

    run(test)


def test_an_idle_adapter_is_unloaded_alone_and_joins_its_server_again(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)

    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, name="base")
        tuned = await started(manager, adapter, name="tuned", **IDLE)
        assert tuned.pid == base.pid
        assert (await until(manager, tuned.id, S.PAUSED)).pid is None
        assert await answered(manager, "base") == str(tiny_model)
        async with httpx.AsyncClient(trust_env=False) as client:
            while len((await client.get(f"http://{base.address}/v1/models")).json()["data"]) > 1:
                await asyncio.sleep(0.01)
        assert await answered(manager, "tuned") == str(adapter)
        assert (await until(manager, tuned.id, S.RUNNING)).pid == base.pid

    run(test)


def test_an_engine_with_requests_stays_loaded_even_during_a_long_request(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage.llm.control_plane.activity._CHECK_SECONDS", 0.05)

    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, tiny_model, name="base", **IDLE)
        end_seconds = time.monotonic() + 3
        while time.monotonic() < end_seconds:
            await answered(manager, "base")
            await asyncio.sleep(0.2)
        manager.requests_in_progress[engine.id] += 1
        end_seconds = time.monotonic() + 3
        while time.monotonic() < end_seconds:
            assert (await manager.get_engine(engine.id)).state is S.RUNNING
            await asyncio.sleep(0.1)
        del manager.requests_in_progress[engine.id]
        events = await manager.get_events(engine.id)
        assert S.STOPPING not in [event.after for event in events]
        await until(manager, engine.id, S.PAUSED)

    run(test)


def test_requests_to_a_standby_keep_an_engine_loaded_and_load_it_again(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        standby = ControlPlaneManager(load_settings(), standby=True)
        await standby.open()
        try:
            engine = await started(manager, tiny_model, name="base", **IDLE)
            await until(manager, engine.id, S.PAUSED)
            end_seconds = time.monotonic() + 3
            while time.monotonic() < end_seconds:
                assert await answered(standby, "base") == str(tiny_model)
                await asyncio.sleep(0.1)
            states = [event.after for event in await manager.get_events(engine.id)]
            assert states.count(S.PAUSED) == 1
            await until(manager, engine.id, S.PAUSED)
        finally:
            await standby.close()

    run(test)


def test_requests_at_the_moment_of_the_pause_are_all_answered(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await started(manager, tiny_model, name="base", **IDLE)
        for number in range(10):
            await until(manager, engine.id, S.RUNNING)
            await asyncio.sleep(0.95 + number / 100)  # the requests arrive between just before and just after the pause
            assert await answered(manager, "base") == str(tiny_model)

    run(test)
