"""The run directory: all data that worker and manager share. docs/internals/run-directory.md describes the files."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage.common.files import fsync_path, fsync_tree
from sage.common.paths import private_folder
from sage.common.training import AnyRunEvent, parse_event
from sage.libs.finetune.config import FinetuneConfig

#: Environment variable with the rank of an additional process of a run; the main process does not have this variable.
RANK_VARIABLE = "SAGE_WORKER_RANK"
#: Events that are synced to disk before the run continues. A power failure can lose other events, such as `step`. The
#: resumed run repeats the steps whose events are lost.
_DURABLE = ("launched", "started", "checkpoint", "changed", "forked", "stopped", "finished", "failed")
#: Size of a file that is removed when a run fails, so that the run can write its last events even if the disk is full.
_RESERVE_BYTES = 64 * 1024


@dataclass(frozen=True)
class RunSpec:
    """The requested configuration of a run, and the hash of the run's training data and reward file."""

    task_id: str
    config: FinetuneConfig
    dataset_sha256: str
    created_at: str  #: ISO 8601, UTC
    forked_from: Mapping[str, Any] | None = None  #: `task_id` of the original run, and `step` of the checkpoint


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec_path = path / "spec.json"
        self.events_path = path / "events.jsonl"
        self.summary_path = path / "summary.json"
        self.log_path = path / "worker.log"
        self.lock_path = path / "worker.lock"
        self.staging_path = path / "staging"
        self.served_path = path / "served"
        self._reserve_path = path / ".reserve"
        self._request_path = path / "checkpoint-request"
        self.options_path = path / "options.json"

    def create(self, spec: RunSpec, fill: "Callable[[RunDirectory], None] | None" = None) -> None:
        """Create the folder with its spec atomically; do nothing if the run exists.

        fill: function that writes other files into the folder before the folder gets its final name.
        """
        if self.spec_path.exists():
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        private_folder(partial)
        content = {**vars(spec), "config": spec.config.model_dump(mode="json")}
        (partial / "spec.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        try:
            if fill:
                fill(RunDirectory(partial))
        except Exception:
            shutil.rmtree(partial)
            raise
        fsync_tree(partial)
        os.replace(partial, self.path)
        fsync_path(self.path.parent)

    def read_spec(self) -> RunSpec:
        """Return the spec that the run was created with."""
        content = json.loads(self.spec_path.read_text(encoding="utf-8"))
        return RunSpec(**{**content, "config": FinetuneConfig.model_validate(content["config"])})

    def append_event(self, event: AnyRunEvent) -> None:
        """Set the time of an event to the current time, and append the event in a single write.

        A crash can damage only the last line; readers skip damaged lines.
        """
        line = _line(event.model_copy(update={"time": datetime.now(UTC)}))
        with self.events_path.open("ab+") as file:
            if file.tell() and not self._ends_with_newline(file.fileno(), file.tell()):
                line = b"\n" + line
            file.write(line)
            if event.event in _DURABLE:
                file.flush()
                os.fsync(file.fileno())

    def copy_events(self, events: Iterable[AnyRunEvent]) -> None:
        """Append events of another run, with their original times."""
        with self.events_path.open("ab") as file:
            file.writelines(map(_line, events))

    def read_events(self, offset: int = 0) -> Iterator[tuple[AnyRunEvent, int]]:
        """Yield each complete event after a byte offset, with the byte offset of its end; damaged lines are skipped."""
        try:
            file = self.events_path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n") and (event := parse_event(line)):
                    yield event, offset

    def request_checkpoint(self) -> None:
        """Request that the run saves a checkpoint after its current step."""
        self._request_path.touch()

    def take_checkpoint_request(self) -> bool:
        """Return whether a checkpoint was requested, and remove the request."""
        try:
            self._request_path.unlink()
        except FileNotFoundError:
            return False
        return True

    def reserve_space(self) -> None:
        """Reserve disk space for the last events of the run."""
        if not self._reserve_path.exists():
            self._reserve_path.write_bytes(b"\0" * _RESERVE_BYTES)

    def clear_staging(self) -> None:
        """Remove the incomplete checkpoint that an earlier process left in the staging folder."""
        shutil.rmtree(self.staging_path, ignore_errors=True)

    def release_space(self) -> None:
        """Free the reserved disk space, so that the run can write its last events."""
        self._reserve_path.unlink(missing_ok=True)

    @staticmethod
    def _ends_with_newline(descriptor: int, size: int) -> bool:
        return os.pread(descriptor, 1, size - 1) == b"\n"


def _line(event: AnyRunEvent) -> bytes:
    return json.dumps(event.model_dump(mode="json", exclude_none=True), ensure_ascii=False).encode() + b"\n"


class SilentRunDirectory(RunDirectory):
    """The run directory as used by the additional processes of a run. Only the main process appends events."""

    def append_event(self, event: AnyRunEvent) -> None:
        """Do nothing."""
