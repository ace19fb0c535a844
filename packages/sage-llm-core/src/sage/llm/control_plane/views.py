"""Create the view of an engine for users, from the data of the store and the prober."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sage.common.errors import first_line
from sage.llm.client.types import SETTLED, EngineKind, EngineState, EngineView, Reason
from sage.llm.control_plane.executors.base import Executor, Observed
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.store.servers import HOSTED

logger = logging.getLogger(__name__)
#: Maximum number of engines in the cache. The cache holds the fields of stopped, completed and failed engines whose
#: `figures` are not in the store.
_MAX_READ = 10_000


class Views:
    """Creates views of engines."""

    def __init__(self, node: str, executors: Mapping[EngineKind, Executor]) -> None:
        self._node, self._executors = node, executors
        self._read = lru_cache(_MAX_READ)(self._read_fields)

    def view(
        self,
        engine: EngineRecord,
        server: ServerRecord | None,
        observed: Observed | None,
        waits: Reason | None = None,
        queue_position: int | None = None,
        *,
        trouble: str = "",
        silent_seconds: float = 0.0,
    ) -> EngineView:
        """Return the view of an engine.

        waits: why a queued engine waits.  queue_position: place of the engine in the queue, from 1.
        trouble: why the engine cannot be observed.
        silent_seconds: how long an unresponsive engine has not answered. 0: the engine is responsive.
        """
        is_local, is_hosted = engine.node == self._node, engine.state in HOSTED
        address = server.address if server and is_hosted else None
        fields: dict[str, Any] = {"reason": waits if waits and engine.state is EngineState.QUEUED else engine.reason}
        if is_local:
            fields |= self._fields(engine, observed)
        if observed:
            if observed.process:
                fields |= {"pid": observed.process.pid, "memory_bytes": observed.process.memory_bytes}
            if observed.alive and observed.reason:  # the process is alive, but the engine's files cannot be read
                fields["reason"] = observed.reason
        if trouble:
            fields["reason"] = Reason(code="engine_unreadable", message=f"The engine cannot be observed: {trouble}.")
        if silent_seconds:
            fields["reason"] = _unresponsive(engine, silent_seconds)
        return EngineView(
            id=engine.id,
            kind=engine.kind,
            model=engine.model,
            name=engine.name,
            backend=engine.backend,
            backend_reason=engine.backend_reason,
            state=engine.state,
            desired=engine.desired,
            restart_policy=engine.restart_policy,
            on_busy=engine.on_busy,
            priority=engine.priority,
            not_before=engine.not_before,
            queue_position=queue_position,
            devices=list(server.devices) if server and server.devices and is_hosted else None,
            reserved_bytes=server.reserved_bytes if server and is_hosted else engine.reserved_bytes,
            restarts=engine.restarts,
            max_restarts=engine.max_restarts,
            node=engine.node,
            server_id=engine.server_id if is_hosted else None,
            idle_stop_minutes=engine.idle_stop_minutes,
            threads=((observed and observed.threads) or engine.threads) if is_hosted else None,
            address=address,
            port=int(address.rpartition(":")[2]) if address else None,
            created_at=engine.created_at,
            state_at=engine.state_at,
            metadata=dict(engine.metadata),
            log_path=str(self._executors[engine.kind].log_path(engine)) if is_local else "",
            **fields,
        )

    def _fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]:
        try:
            if engine.state in SETTLED and engine.figures is None:
                return self._read(_Key(engine))
            return self._executors[engine.kind].view_fields(engine, observed)
        except Exception as error:
            logger.debug("the data of engine %s cannot be read", engine.id, exc_info=error)
            message = f"The engine's files cannot be read: {type(error).__name__}: {first_line(error)}."
            return {"reason": engine.reason or Reason(code="engine_unreadable", message=message)}

    def _read_fields(self, key: "_Key") -> Mapping[str, Any]:
        return self._executors[key.engine.kind].view_fields(key.engine, None)


class _Key:
    def __init__(self, engine: EngineRecord) -> None:
        self.engine = engine

    def __hash__(self) -> int:
        return hash((self.engine.id, self.engine.version))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key):
            return NotImplemented
        return (self.engine.id, self.engine.version) == (other.engine.id, other.engine.version)


def _unresponsive(engine: EngineRecord, silent_seconds: float) -> Reason:
    return Reason(
        code="engine_unresponsive",
        message=f"The engine has not answered for {silent_seconds:.0f} s, and requests are refused until it answers again.",
        hint=f"To restart, run `sage llm engine stop --force {engine.id}`, then `sage llm engine resume {engine.id}`.",
    )
