"""Engines as the store has them, for tests without processes."""

from datetime import UTC, datetime
from typing import Any

from sage.llm.client.types import EngineKind, EngineState, Wanted
from sage.llm.control_plane.store.store import EngineRecord


def record(state: EngineState = EngineState.QUEUED, wanted: Wanted = Wanted.RUNNING, **values: Any) -> EngineRecord:
    """Return an engine of kind llm, named 'm', with the id 'engine-a', if not told otherwise."""
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": "engine-a", "kind": EngineKind.LLM, "model": "m", "name": "m", "options": {}, "reason": None, "node": "n",
        "port": None, "requested_port": None, "version": 1, "created_at": now, "state_at": now, **values,
    }  # fmt: skip
    return EngineRecord(state=state, wanted=wanted, **fields)
