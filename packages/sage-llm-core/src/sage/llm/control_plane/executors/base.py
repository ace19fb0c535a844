"""The executor: what the reconciler and the manager need of an engine kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sage.common.processes import ProcessSpec
from sage.common.training import TrainingProgress
from sage.llm.client.types import EngineState, Reason, StartRequest, TrainingStep
from sage.llm.control_plane.launchers.base import ProcessObservation
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord


@dataclass(frozen=True)
class Observed:
    """What is the case, whatever the store says."""

    alive: bool  #: it has a process
    ready: bool = False  #: it answers, or trains
    ended: EngineState | None = None  #: it settled by itself, and in which state
    reason: Reason | None = None  #: of `ended`, or of a death
    orphaned: bool = False  #: its process has exited, children of it have not
    process: ProcessObservation | None = None
    training: TrainingProgress | None = None


@dataclass(frozen=True)
class Prepared:
    """A request that passed the fast checks."""

    backend: str
    options: dict[str, Any]


class Executor(Protocol):
    """Runs engines of a kind."""

    async def prepare(self, engine_id: str, request: StartRequest) -> Prepared: ...
    async def validate(self, engine: EngineRecord) -> None: ...
    async def discard(self, engine_id: str) -> None: ...
    async def check_resumable(self, engine: EngineRecord) -> None: ...
    def spec(self, engine: EngineRecord, server: ServerRecord | None) -> ProcessSpec: ...
    async def plan_server(self, engine: EngineRecord) -> ServerRecord: ...
    async def probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed: ...
    def view_fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]: ...
    async def training_steps(self, engine: EngineRecord, after: int, max_points: int | None) -> list[TrainingStep]: ...
    def log_path(self, engine: EngineRecord) -> Path: ...
    async def remove(self, engine: EngineRecord) -> None: ...
