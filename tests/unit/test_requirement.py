"""The interface that the requirement of this project prescribes: names, fields and defaults."""

import asyncio
import dataclasses
import inspect
from pathlib import Path
from typing import Any, Optional, get_type_hints

import pytest

from sage.common.errors import Conflict
from sage.common.paths import get_user_paths
from sage.common.settings import load_settings
from sage.libs.finetune.manager import FinetuneManager
from sage.llm import control_plane
from sage.llm.control_plane.executors.finetune_executor import FinetuneEngine, FinetuneEngineConfig
from sage.llm.control_plane.manager import SUPPORTED_ENGINE_KINDS, ControlPlaneManager


def test_the_engine_kinds_are_exported_as_the_requirement_defines_them() -> None:
    assert SUPPORTED_ENGINE_KINDS == ["llm", "embedding", "finetune"]
    assert control_plane.SUPPORTED_ENGINE_KINDS == SUPPORTED_ENGINE_KINDS
    assert control_plane.ControlPlaneManager is ControlPlaneManager
    assert inspect.iscoroutinefunction(ControlPlaneManager.start_engine)


def test_the_configuration_has_the_fields_and_defaults_of_the_requirement() -> None:
    required = ["base_model", "dataset_path", "output_dir"]
    defaults = {
        "lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-4, "num_epochs": 3, "batch_size": 4, "max_seq_length": 512,
        "use_8bit": True, "resume_from_checkpoint": None,
    }  # fmt: skip
    fields = dataclasses.fields(FinetuneEngineConfig)
    assert [field.name for field in fields] == [*required, *defaults]
    assert {field.name: field.default for field in fields[3:]} == defaults
    types = get_type_hints(FinetuneEngineConfig)
    assert {types[name] for name in required} == {str}
    assert types["resume_from_checkpoint"] == Optional[str]  # noqa: UP045 - as the requirement writes it


def test_the_engine_has_the_interface_of_the_requirement() -> None:
    engine = FinetuneEngine(FinetuneEngineConfig(base_model="m", dataset_path="d", output_dir="o"))
    assert FinetuneEngine.engine_kind == "finetune"
    assert isinstance(engine.manager, FinetuneManager)
    assert callable(engine.manager.start_training)
    assert (engine.task_id, engine.status) == (None, "not_started")
    for name in ("start", "stop", "get_status", "get_logs"):
        assert inspect.iscoroutinefunction(getattr(engine, name))
    assert get_type_hints(engine.start)["return"] == dict[str, Any]
    assert inspect.signature(engine.get_logs).parameters["tail"].default == 100
    with pytest.raises(Conflict, match="was not started"):
        asyncio.run(engine.get_logs(tail=5))


def test_checkpoints_are_below_the_models_folder() -> None:
    assert FinetuneManager().root == get_user_paths().models_dir / "finetuned"


def test_the_manager_opens_in_an_empty_home(sage_home: Path) -> None:
    manager = ControlPlaneManager(load_settings())
    assert asyncio.run(manager.list_engines()) == []
