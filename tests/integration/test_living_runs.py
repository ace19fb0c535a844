"""Change and fork training runs through the control plane, with real worker processes."""

import asyncio
from pathlib import Path

import pytest
from serving import run, until
from support import SAMPLES

from sage.common.errors import ConfigError, Conflict
from sage.common.training import TrainingOptions
from sage.llm.client.run_types import ForkRequest
from sage.llm.client.types import EngineKind, EngineState, StartRequest
from sage.llm.control_plane.manager import ControlPlaneManager


def test_a_running_run_is_changed_and_forked(tiny_model: Path, tmp_path: Path) -> None:
    options = {"dataset_path": str(SAMPLES), "max_steps": 5000, "save_steps": 1, "output_dir": str(tmp_path / "out")}

    async def test(manager: ControlPlaneManager) -> None:
        request = StartRequest(model=str(tiny_model), engine_kind=EngineKind.FINETUNE, options=options)
        engine = await manager.start_engine(request)
        await until(manager, engine.id, EngineState.RUNNING)
        accepted = await manager.change_training(engine.id, TrainingOptions(learning_rate=1e-3, max_steps=4000))
        async with asyncio.timeout(120):
            while True:
                training = (await manager.get_engine(engine.id)).training
                if training and training.change_revision == accepted.revision and training.checkpoint_step:
                    break
                await asyncio.sleep(0.02)
        assert training.total_steps == 4000
        assert "learning_rate 0.0001 -> 0.001" in training.changes[0]
        with pytest.raises(ConfigError, match="has already completed step"):
            await manager.change_training(engine.id, TrainingOptions(max_steps=1))
        fork = await manager.fork_engine(
            engine.id, ForkRequest(output_dir=str(tmp_path / "fork"), options={"max_steps": 10_000})
        )
        forked = await until(manager, fork.id, EngineState.RUNNING)
        assert forked.training
        assert forked.training.forked_from == engine.task_id
        assert forked.training.total_steps == 10_000
        for engine_id in (engine.id, fork.id):
            await manager.stop_engine(engine_id)
            await until(manager, engine_id, EngineState.STOPPED)

    run(test)


def test_the_training_options_of_a_served_model_cannot_be_changed(tiny_model: Path, tmp_path: Path) -> None:
    async def test(manager: ControlPlaneManager) -> None:
        engine = await manager.start_engine(StartRequest(model=str(tiny_model)))
        with pytest.raises(Conflict, match="is an engine of kind llm, not a training run"):
            await manager.change_training(engine.id, TrainingOptions(max_steps=1))
        await manager.stop_engine(engine.id, force=True)

    run(test)
