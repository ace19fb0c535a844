"""Checkpoints and results of real training runs are served. A small fake server stands for the model server."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import HostingBackend, answered, run, started, until
from support import SAMPLES

from sage.common.errors import Conflict
from sage.llm.client.types import EngineKind, EngineState, EngineView, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.manager import ControlPlaneManager

S = EngineState


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hosting", "transformers"):
        monkeypatch.setitem(registry.BACKENDS, name, HostingBackend())
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "0.02")


async def train(
    manager: ControlPlaneManager, model: Path, output: Path, serve: dict[str, Any], **options: Any
) -> EngineView:
    """Start a run that ends only when it is stopped."""
    values = {"dataset_path": str(SAMPLES), "output_dir": str(output), "max_steps": 1_000_000, **options}
    request = StartRequest.model_validate(
        {"model": str(model), "engine_kind": EngineKind.FINETUNE, "serve": serve, "options": values}
    )
    return await until(manager, (await manager.start_engine(request)).id, S.RUNNING)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def served(manager: ControlPlaneManager, run_id: str) -> EngineView:
    """Wait until a run is served, and return the engine that serves it."""
    async with asyncio.timeout(60):
        while not (served_by := (await manager.get_engine(run_id)).served_by):
            await asyncio.sleep(0.01)
    return await until(manager, served_by, S.RUNNING)


def test_the_checkpoints_and_then_the_result_of_a_run_are_served_and_no_request_fails(
    tiny_model: Path, tmp_path: Path
) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model, name="base")
        serve = {"name": "tuned", "checkpoints": True}
        training = await train(manager, tiny_model, tmp_path / "out", serve, save_steps=20, keep_checkpoints=1)
        tuned = await served(manager, training.id)
        assert (tuned.name, tuned.server_id) == ("tuned", base.server_id)
        answers: list[str] = []

        async def ask() -> None:
            while True:
                answers.append(await answered(manager, "tuned"))

        asking = [asyncio.create_task(ask()) for _ in range(2)]
        await eventually(lambda: len(set(answers)) >= 4 or any(task.done() for task in asking))
        await manager.stop_engine(training.id)
        await until(manager, training.id, S.STOPPED)
        await eventually(lambda: answers[-1] == str(tmp_path / "out") or any(task.done() for task in asking))
        for task in asking:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task  # raises the error of a failed request
        steps = [int(folder.partition("step-")[2]) for folder in answers if "step-" in folder]
        assert len(set(steps)) >= 3
        assert [engine.id for engine in await manager.list_engines()] == [base.id, training.id, tuned.id]

    run(test)


def test_one_engine_serves_a_result_even_after_a_restart_and_a_checkpoint_only_on_request(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "assistant"
    ids: list[str] = []

    async def begin(manager: ControlPlaneManager) -> None:
        training = await train(manager, tiny_model, output, {}, save_steps=30)
        ids.append(training.id)
        async with asyncio.timeout(60):
            while not ((view := await manager.get_engine(training.id)).training and view.training.checkpoint_step):
                await asyncio.sleep(0.01)
        assert view.served_by is None
        await manager.checkpoint_engine(training.id)
        tuned = await served(manager, training.id)
        assert tuned.name == "assistant"
        assert await answered(manager, "assistant") == tuned.model
        await manager.stop_engine(training.id)

    async def after_a_restart(manager: ControlPlaneManager) -> None:
        training = await until(manager, ids[0], S.STOPPED)
        async with asyncio.timeout(60):
            while await answered(manager, "assistant") != str(output):
                await asyncio.sleep(0.01)
        assert [engine.id for engine in await manager.list_engines()] == [training.id, training.served_by]

    run(begin)
    run(after_a_restart)


def test_the_checkpoint_of_a_killed_run_stays_served_and_cannot_be_removed(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        serve = {"name": "tuned", "checkpoints": True}
        training = await train(manager, tiny_model, tmp_path / "out", serve, save_steps=20)
        tuned = await served(manager, training.id)
        await manager.stop_engine(training.id, force=True)
        await until(manager, training.id, S.FAILED)
        with pytest.raises(Conflict, match=f"has a checkpoint that the engine {tuned.id} serves"):
            await manager.remove_engine(training.id)
        assert "/served/step-" in await answered(manager, "tuned")
        await manager.stop_engine(tuned.id)
        await until(manager, tuned.id, S.STOPPED)
        await manager.remove_engine(training.id)

    run(test)


def test_only_a_training_run_saves_checkpoints(tiny_model: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        base = await started(manager, tiny_model)
        with pytest.raises(Conflict) as caught:
            await manager.checkpoint_engine(base.id)
        assert caught.value.code == "not_training"

    run(test)
