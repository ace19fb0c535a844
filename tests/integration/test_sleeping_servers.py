"""Servers that sleep on a simulated GPU to make room for another engine; their processes are real."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from serving import HostingBackend, answered, make_adapter, run, start, started, until

from sage.llm.client.types import EngineState, EngineView
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState


class SleepingBackend(HostingBackend):
    """The backend of a server that can sleep."""

    capabilities = replace(HostingBackend.capabilities, asleep_bytes=10**9)


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "hosting", SleepingBackend())
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0.02")
    monkeypatch.setenv("SAGE_FAKE_DEVICES", "1x10GiB")


async def preempted(manager: ControlPlaneManager, model: Path, *names: str) -> EngineView:
    """Start a dedicated engine that needs most of the memory, and wait until the engines with these ids are paused."""
    other = await start(manager, model, name="other", memory_gb=6, on_busy="preempt", dedicated=True)
    for engine_id in names:
        await until(manager, engine_id, S.PAUSED)
    await until(manager, other.id, S.RUNNING)
    return other


def test_a_base_and_its_adapter_sleep_and_wake_in_the_same_process(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model)

    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, name="base", memory_gb=8)
        tuned = await started(manager, adapter, name="tuned", memory_gb=8)
        assert (base.devices, tuned.pid) == (["cuda:0"], base.pid)
        other = await preempted(manager, tiny_model, base.id, tuned.id)
        assert psutil.pid_exists(base.pid or 0)
        await manager.stop_engine(other.id)
        running = [await until(manager, engine.id, S.RUNNING) for engine in (base, tuned)]
        assert {engine.pid for engine in running} == {base.pid}
        assert await answered(manager, "base") == str(tiny_model)
        assert await answered(manager, "tuned") == str(adapter)

    run(test)


def test_a_model_whose_sleeping_server_was_killed_is_loaded_again(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        model = await started(manager, tiny_model, memory_gb=8)
        other = await preempted(manager, tiny_model, model.id)
        assert model.pid
        os.kill(model.pid, signal.SIGKILL)
        await manager.stop_engine(other.id)
        assert (await until(manager, model.id, S.RUNNING)).pid != model.pid

    run(test)


def test_a_sleeping_server_ends_when_its_memory_is_needed_or_its_engine_is_stopped(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        evicted = await started(manager, tiny_model, memory_gb=8)
        other = await preempted(manager, tiny_model, evicted.id)
        large = await started(manager, tiny_model, name="large", memory_gb=4, dedicated=True)
        assert not psutil.pid_exists(evicted.pid or 0)
        for engine in (large, other):
            await manager.stop_engine(engine.id)
        stopped = await until(manager, evicted.id, S.RUNNING)
        await preempted(manager, tiny_model, stopped.id)
        await manager.stop_engine(stopped.id)
        async with asyncio.timeout(60):
            while psutil.pid_exists(stopped.pid or 0):
                await asyncio.sleep(0.01)

    run(test)
