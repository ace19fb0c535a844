"""Create database records of engines and servers, for tests without processes."""

from datetime import UTC, datetime
from typing import Any

from sage.llm.client.types import DesiredState, EngineKind, EngineState, RestartPolicy
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState

RUNNING = DesiredState.RUNNING


def record(
    state: EngineState = EngineState.QUEUED, desired: DesiredState = DesiredState.RUNNING, **values: Any
) -> EngineRecord:
    """Return the record of an llm engine with id 'engine-a', name 'm' and node 'n'; values: fields to replace."""
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": "engine-a", "kind": EngineKind.LLM, "model": "m", "name": "m", "backend": "transformers", "options": {},
        "metadata": {}, "force": False, "restart_policy": RestartPolicy.NO, "restarts": 0, "reason": None, "figures": None,
        "node": "n", "server_id": None, "requested_port": None, "devices": None, "reserved_bytes": None, "version": 1,
        "created_at": now, "state_at": now, "first_event": 0, "last_event": 0, **values,
    }  # fmt: skip
    return EngineRecord(state=state, desired=desired, **fields)


def server(state: ServerState = ServerState.LAUNCHED, **values: Any) -> ServerRecord:
    """Return the record of the server of 'engine-a'; values: fields to replace."""
    fields: dict[str, Any] = {
        "id": "server-a", "node": "n", "backend": "transformers", "model": "m", "handle": "/engine-a/process.lock",
        "address": "127.0.0.1:9000", "devices": None, "reserved_bytes": None, "version": 1, "created_at": datetime.now(UTC),
        **values,
    }  # fmt: skip
    return ServerRecord(state=state, **fields)
