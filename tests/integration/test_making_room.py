"""Real training runs that wait for memory, or get the memory of a served model. A small test server serves the model."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from serving import HostingBackend, answered, run, started, until
from support import SAMPLES

from sage.llm.client.types import EngineKind, EngineState, EngineView, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "hosting", HostingBackend())
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0.02")
    monkeypatch.setenv("SAGE_MEMORY_LIMIT_GB", "1.5")


async def train(manager: ControlPlaneManager, model: Path, output: Path, steps: int, **fields: Any) -> EngineView:
    """Start a run that reserves 1 GB."""
    options = {"dataset_path": str(SAMPLES), "output_dir": str(output), "max_steps": steps, "save_steps": 5}
    request = {"model": str(model), "engine_kind": EngineKind.FINETUNE, "memory_gb": 1, "options": options, **fields}
    return await manager.start_engine(StartRequest.model_validate(request))


def test_a_model_makes_room_for_a_run_and_all_requests_to_the_model_are_answered(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        model = await started(manager, tiny_model, name="chat", memory_gb=1)
        answers: list[str] = []

        async def ask() -> None:
            while True:
                answers.append(await answered(manager, "chat"))

        asking = asyncio.create_task(ask())
        training = await train(manager, tiny_model, tmp_path / "out", 10, on_busy="preempt")
        paused = await until(manager, model.id, S.PAUSED)
        assert paused.reason
        assert (paused.reason.code, training.id in paused.reason.message) == ("makes_room", True)
        await until(manager, training.id, S.COMPLETED)
        count = len(answers)
        await until(manager, model.id, S.RUNNING)
        async with asyncio.timeout(60):
            while len(answers) < count + 3 and not asking.done():
                await asyncio.sleep(0.01)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking  # raises the error if a request failed
        assert set(answers) == {str(tiny_model)}

    run(test)


def test_runs_wait_in_a_queue_whose_order_a_user_can_change(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        first = await train(manager, tiny_model, tmp_path / "1", 1_000_000)
        await until(manager, first.id, S.RUNNING)
        second, third = [await train(manager, tiny_model, tmp_path / name, 1) for name in ("2", "3")]
        for waiting in (second, third):
            await until(manager, waiting.id, S.QUEUED)
        async with asyncio.timeout(60):
            while [view.queue_position for view in await manager.waiting_engines()] != [1, 2]:
                await asyncio.sleep(0.01)
        queue = await manager.waiting_engines()
        assert [view.reason and view.reason.code for view in queue] == ["memory_busy", "memory_busy"]
        await manager.move_engine(queue[1].id, 1)
        moved = await manager.waiting_engines()
        assert [view.id for view in moved] == [queue[1].id, queue[0].id]
        await manager.stop_engine(first.id)
        ended = [await until(manager, view.id, S.COMPLETED) for view in moved]
        assert ended[0].state_at < ended[1].state_at

    run(test)


@pytest.mark.long
def test_a_paused_run_frees_its_memory_and_continues_with_the_same_losses(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        whole = await train(manager, tiny_model, tmp_path / "whole", 60)
        await until(manager, whole.id, S.COMPLETED)
        training = await train(manager, tiny_model, tmp_path / "out", 60)
        await until(manager, training.id, S.RUNNING)
        await manager.pause_engine(training.id)
        paused = await until(manager, training.id, S.PAUSED)
        assert (paused.pid, paused.devices) == (None, None)
        assert paused.training
        assert paused.training.step < 60
        assert await manager.waiting_engines() == []
        await manager.resume_engine(training.id)
        await until(manager, training.id, S.COMPLETED)
        losses = [[step.loss for step in await manager.get_training_steps(each.id)] for each in (whole, training)]
        assert losses[0] == losses[1]

    run(test)
