"""The executor: what the reconciler needs of an engine kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sage.common.identity import ProcessIdentity
from sage.llm.client.types import EngineState, Reason, StartRequest, TrainingStep
from sage.llm.control_plane.store.store import EngineRecord


@dataclass(frozen=True)
class Observed:
    """What is, whatever the store says."""

    alive: bool  #: it has a process
    ready: bool = False  #: it answers, or trains
    ended: EngineState | None = None  #: it settled by itself, and in which state
    reason: Reason | None = None  #: of `ended`, or of a death
    orphaned: bool = False  #: its process is gone, children of that are not


class Executor(Protocol):
    """Runs engines of a kind. Nothing here waits for an engine to get somewhere.

    OSError from `observe`, `port` and `request_stop` means that it is not known what is: the reconciler looks again.
    """

    async def prepare(self, engine_id: str, request: StartRequest) -> dict[str, Any]:
        """Check a request and return the options to keep; raises SageError, and then nothing was done."""

    async def discard(self, engine_id: str) -> None:
        """Remove what `prepare` made for an engine that was never kept."""

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the engine cannot be started again."""

    async def launch(self, engine: EngineRecord) -> int | None:
        """Start the engine's process; return the port it will answer on, if any."""

    async def port(self, engine: EngineRecord) -> int | None:
        """Return the port of a process that lives, if it has any."""

    async def observe(self, engine: EngineRecord) -> Observed:
        """Return what is."""

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        """Ask the process to end (`force`: kill it, and its children)."""

    def process(self, engine: EngineRecord) -> ProcessIdentity | None:
        """Return the engine's process, or None."""

    async def describe(self, engine: EngineRecord) -> dict[str, Any]:
        """Return the fields of EngineView that only the executor knows."""

    async def training_steps(self, engine: EngineRecord) -> list[TrainingStep]:
        """Return the steps of a training run, one for each; none for what does not train."""

    def log_path(self, engine: EngineRecord) -> Path:
        """Return where the engine's log is."""

    async def remove(self, engine: EngineRecord) -> None:
        """Remove what the engine keeps on disk; a result that it gave away stays."""
