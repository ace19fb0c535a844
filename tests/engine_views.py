"""Create EngineView objects for tests without a gateway."""

from datetime import UTC, datetime
from typing import Any

from sage.common.training import TrainingProgress
from sage.llm.client.types import EngineView


def engine_view(**values: Any) -> EngineView:
    """Return the view of a running fine-tuning engine; values: fields to replace."""
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": "engine-a",
        "kind": "finetune",
        "model": "m",
        "name": "m",
        "backend": "trainer",
        "state": "running",
        "desired": "running",
        "restart_policy": "no",
        "node": "node-a",
        "created_at": now,
        "state_at": now,
        "log_path": "/log",
        "output_dir": "/out",
        "run_dir": "/run",
    }
    return EngineView(**{**fields, **values})


def training_progress(**values: Any) -> TrainingProgress:
    """Return the progress of a run at step 5 of 10; values: fields to replace."""
    return TrainingProgress(**{"step": 5, "total_steps": 10, "progress": 0.5, **values})
