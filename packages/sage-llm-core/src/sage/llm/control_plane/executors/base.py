"""The executor interface: the operations that the control plane needs for each kind of engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from sage.common.processes import ProcessSpec
from sage.common.training import TrainingProgress, TrainingStep
from sage.llm.client.types import EngineState, Reason, StartRequest
from sage.llm.control_plane.launchers.base import ProcessObservation
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState, suffix_of


@dataclass(frozen=True)
class Prepared:
    """The values of a checked request that are stored in the record of the engine."""

    backend: str  #: name in the registry, never `auto`
    options: Mapping[str, Any] = field(default_factory=dict)
    reserved_bytes: int | None = None  #: memory that the engine is expected to need; None: not known
    backend_reason: str | None = None  #: why `auto` chose the backend; None: the request named a backend
    least_bytes: int | None = None  #: smallest memory with which the engine can run; None: the same as `reserved_bytes`


@dataclass(frozen=True)
class Tokens:
    """The numbers of tokens that a model has processed since it was loaded."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Observed:
    """The observed condition of an engine, independent of the state in the store."""

    alive: bool  #: the engine has a process
    ready: bool = False  #: the engine answers requests, or trains
    ended: EngineState | None = None  #: the state that the engine reported when it ended
    reason: Reason | None = None  #: why the engine or its process ended
    orphaned: bool = False  #: the engine's process has exited, but child processes are alive
    process: ProcessObservation | None = None
    training: TrainingProgress | None = None
    crash: str | None = None  #: text such as `step 12`: where a run exited without reporting an error; None: no such exit
    models: frozenset[str] = frozenset()  #: names of the models that a shared server has loaded
    context_tokens: int | None = None
    slots: int | None = None
    tokens: Tokens | None = None  #: None: the server does not count tokens
    threads: int | None = None  #: number of CPU threads; None: the number cannot change while the server runs
    is_active: bool = True  #: False: the server reports that it has had no requests in the last seconds


class Executor(Protocol):
    """Checks, runs and observes engines of one or more kinds. Every `async` method returns soon, or can be cancelled.

    If a method raises OSError, the result is not known, and the caller retries.
    """

    async def prepare(self, engine_id: str, request: StartRequest) -> Prepared:
        """Check a request. Raises SageError."""

    async def validate(self, engine: EngineRecord) -> Mapping[str, Any]:
        """Run the slow checks, for example of the dataset, and create the files of the engine. Raises SageError.

        Returns values to store in the engine's columns. This method is called before each start that a user requests. It can
        be called several times before one start.
        """

    async def discard(self, engine_id: str) -> None:
        """Remove the files that `validate` created."""

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise SageError if the engine cannot be started again."""

    def spec(self, engine: EngineRecord, server: ServerRecord) -> ProcessSpec:
        """Return the specification of the process to launch. This method blocks.

        Call this method only immediately before a launch. If the engine is a training run, this method also records the
        launch in the run's events.
        """

    def plan_server(self, engine: EngineRecord, *, is_moved: bool = False) -> ServerRecord:
        """Return the record of a new server for an engine.

        is_moved: whether other engines use the engine's last server. In this case, the new server gets a different id.
        """

    async def probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed:
        """Return the condition of an engine.  process: the observation of the engine's process.

        Raises OSError if the condition is not known.
        """

    def view_fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]:
        """Return the fields of EngineView that only the executor knows. This method blocks."""

    async def training_steps(self, engine: EngineRecord, after: int, max_points: int | None) -> list[TrainingStep]:
        """Return the steps of a training run after step `after`, downsampled to at most `max_points`."""

    async def checkpoint_step(self, engine: EngineRecord) -> int:
        """Return the step of a training run's newest checkpoint, or 0 if the run has no checkpoint."""

    async def request_checkpoint(self, engine: EngineRecord) -> None:
        """Ask a training run to save a checkpoint after its current step."""

    async def publish_checkpoint(self, engine: EngineRecord, step: int) -> Path:
        """Return a folder that contains a checkpoint of a training run as a model that can be served.

        The folder is kept even if the run removes the checkpoint. Raises ModelError if the checkpoint is not an adapter.
        """

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the path of the engine's log."""

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the files of an engine and of its last server, but not the result of a training run.

        Call this only if no other engine uses the server.
        """


def server_id_of(engine: EngineRecord) -> str:
    """Return the id of an engine's last server, or the id that the engine's first server will have."""
    return engine.server_id or f"server-{suffix_of(engine.id)}"


def planned_server(engine: EngineRecord, server_id: str, handle: str) -> ServerRecord:
    """Return a new server record in state `planned`, with the values of an engine."""
    return ServerRecord(
        id=server_id,
        node=engine.node,
        backend=engine.backend,
        model=engine.base or engine.model,
        state=ServerState.PLANNED,
        handle=handle,
        address=None,
        devices=engine.devices,
        reserved_bytes=engine.reserved_bytes,
        version=1,
        created_at=datetime.now(UTC),
    )
