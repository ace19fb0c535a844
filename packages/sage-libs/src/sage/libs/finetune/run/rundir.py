"""The run directory: the only thing that the worker and its manager share.

spec.json         what was asked; never changed
events.jsonl      what happened; only appended to
worker.log        plain text for people
worker.lock       held while a worker lives
checkpoint-<n>/   complete or absent
staging/          a checkpoint that is being written
"""

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage.common.files import fsync_path, fsync_tree
from sage.common.paths import private_folder
from sage.libs.finetune.config import FinetuneConfig

Event = dict[str, Any]
#: Which process of a run this is, where several train together; the leader has none.
RANK_VARIABLE = "SAGE_WORKER_RANK"
#: Events that are on the disk before the run goes on; a step that a power cut takes is done again.
_LASTING = ("launched", "started", "checkpoint", "stopped", "finished", "failed")
#: Kept free for the last words of a run whose disk is full.
_RESERVE_BYTES = 64 * 1024


@dataclass(frozen=True)
class RunSpec:
    """What a run was asked to do, and of what."""

    task_id: str
    config: FinetuneConfig
    dataset_sha256: str
    created_at: str  #: ISO 8601, UTC


class RunDirectory:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        """path: the folder; it need not exist yet."""
        self.path = path
        self.spec_path = path / "spec.json"
        self.events_path = path / "events.jsonl"
        self.log_path = path / "worker.log"
        self.lock_path = path / "worker.lock"
        self.staging_path = path / "staging"
        self._reserve_path = path / ".reserve"

    def create(self, spec: RunSpec) -> None:
        """Make the folder with its spec, all or nothing; what is there already stays."""
        if self.spec_path.exists():
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        private_folder(partial)
        content = {**vars(spec), "config": spec.config.model_dump(mode="json")}
        (partial / "spec.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fsync_tree(partial)
        os.replace(partial, self.path)
        fsync_path(self.path.parent)

    def read_spec(self) -> RunSpec:
        """Return what the run was asked to do."""
        content = json.loads(self.spec_path.read_text(encoding="utf-8"))
        return RunSpec(**{**content, "config": FinetuneConfig.model_validate(content["config"])})

    def append_event(self, kind: str, **fields: Any) -> None:
        """Append one event; one write, so that a reader sees it whole or, after a crash, torn and skips it."""
        event = {"event": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        with self.events_path.open("ab+") as file:
            if file.tell() and not self._ends_whole(file.fileno(), file.tell()):
                line = b"\n" + line
            file.write(line)
            if kind in _LASTING:
                file.flush()
                os.fsync(file.fileno())

    def read_events(self, offset: int = 0) -> tuple[list[Event], int]:
        """Return the whole events from a byte offset on, and the offset behind them."""
        try:
            with self.events_path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        except FileNotFoundError:
            return [], offset
        whole = content[: content.rfind(b"\n") + 1]
        return [event for line in whole.splitlines() if (event := _parse(line))], offset + len(whole)

    def reserve_space(self) -> None:
        """Set a little of the disk aside."""
        if not self._reserve_path.exists():
            self._reserve_path.write_bytes(b"\0" * _RESERVE_BYTES)

    def clear_staging(self) -> None:
        """Remove the half of a checkpoint that an earlier process was writing."""
        shutil.rmtree(self.staging_path, ignore_errors=True)

    def release_space(self) -> None:
        """Give it back, so that the run can say why it ends."""
        self._reserve_path.unlink(missing_ok=True)

    @staticmethod
    def _ends_whole(descriptor: int, size: int) -> bool:
        return os.pread(descriptor, 1, size - 1) == b"\n"


class SilentRunDirectory(RunDirectory):
    """The folder as a process has it that is not the one to speak."""

    def append_event(self, kind: str, **fields: Any) -> None:
        """Say nothing."""


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
