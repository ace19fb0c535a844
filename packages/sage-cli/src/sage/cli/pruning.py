"""Delete the records and run directories of engines that ended long ago."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sage.common.errors import Conflict, NotFound
from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineKind, EngineState, EngineView


@dataclass(frozen=True)
class Removal:
    """An engine that was selected to be deleted."""

    engine: EngineView
    freed_bytes: int  #: size of the run directory; 0 if the engine is kept
    kept_because: str = ""  #: why the engine is kept; "" if the engine was or would be deleted

    def content(self) -> dict[str, Any]:
        """Return the removal as JSON content."""
        facts = {"id": self.engine.id, "state": self.engine.state, "run_dir": self.engine.run_dir}
        return {**facts, "freed_bytes": self.freed_bytes, "kept_because": self.kept_because or None}


def prune(client: SageClient, *, older_than_days: float, unfinished: bool, dry_run: bool) -> list[Removal]:
    """Delete the engines that `selected` returns, except engines that other engines need.

    Returns the deleted and the kept engines, oldest first.
    unfinished: also delete training runs that are stopped or failed.  dry_run: delete nothing.
    """
    removals = []
    for engine in selected(client.list_engines(states=sorted(SETTLED)), older_than_days, unfinished=unfinished):
        freed_bytes, kept_because = _size(engine.run_dir), ""
        if not dry_run:
            try:
                client.remove_engine(engine.id)
            except NotFound:  # another client has deleted the engine
                continue
            except Conflict as error:
                freed_bytes, kept_because = 0, error.message
        removals.append(Removal(engine, freed_bytes, kept_because))
    return removals


def selected(engines: Iterable[EngineView], older_than_days: float, *, unfinished: bool) -> list[EngineView]:
    """Return the engines that ended at least `older_than_days` days ago.

    unfinished: also return training runs that are stopped or failed.
    """
    latest = datetime.now(UTC) - timedelta(days=older_than_days)
    return [engine for engine in engines if engine.state_at <= latest and (unfinished or not _is_resumable(engine))]


def _is_resumable(engine: EngineView) -> bool:
    return engine.kind is EngineKind.FINETUNE and engine.state is not EngineState.COMPLETED


def _size(folder: str | None) -> int:
    total = 0
    for path in Path(folder).rglob("*") if folder else ():
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            total += found.st_size // found.st_nlink if path.is_file() else 0
    return total
