"""Create, start, stop and read runs, whose state is on disk. This module does not import torch."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sage.common.errors import Conflict, ModelError, NotFound, OutputError, SageError
from sage.common.ids import random_suffix
from sage.common.logs import tail_lines
from sage.common.paths import get_user_paths
from sage.common.processes import ProcessIdentity, ProcessSpec, holder, spawn
from sage.common.training import AnyRunEvent, LaunchedEvent, TrainingOptions, TrainingStep
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.linting import check_dataset
from sage.libs.finetune.data.preferences import parser_of
from sage.libs.finetune.run.changes import check_change, request_change
from sage.libs.finetune.run.checkpoints import Checkpoint
from sage.libs.finetune.run.forking import checkpoint_to_fork, copy_history, fork_spec
from sage.libs.finetune.run.inputs import check_data, check_method, data_hash
from sage.libs.finetune.run.output import check_claim, claim_output
from sage.libs.finetune.run.publishing import publish_checkpoint
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec
from sage.libs.finetune.run.series import StepSeries
from sage.libs.finetune.run.status import ALIVE, RunState, RunStatus, derive
from sage.libs.finetune.run.summary import Summary, catch_up, read_summary
from sage.libs.finetune.run.trackers import check_trackers
from sage.libs.models.resolve import ModelKind, resolve_model

#: Maximum seconds to wait for a worker to exit after the last event of its run.
_EXIT_SECONDS = 10.0
#: `create` checks at most this number of samples of each dataset. The worker checks all samples.
_CHECKED_SAMPLES = 20_000
_KEPT_SERIES = 16
#: glibc settings that keep the memory of freed tensors. By default, glibc returns large blocks to the kernel, and the kernel
#: clears the pages for each new tensor. With these settings a step on a CPU takes 5 % less time, with the same peak memory.
_MALLOC = "arena_max=1", "mmap_threshold=268435456", "trim_threshold=1073741824"
#: Default environment variables of a worker. Values that the user has set are not changed.
WORKER_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in _MALLOC),
}


class FinetuneManager:
    """Creates, starts, stops and reads runs below one folder."""

    def __init__(self, root: Path | None = None, *, allow_reward_files: bool = False) -> None:
        """root: folder that contains the run directories; default: the user's `models/finetuned`.

        allow_reward_files: whether runs are allowed to use reward files (Python files that the worker executes).
        """
        self.root = root or get_user_paths().finetuned_dir
        self._allow_reward_files = allow_reward_files
        self._status_cache: dict[str, Summary] = {}
        self._series: dict[str, StepSeries] = {}  #: steps by task id; the last entry was used most recently
        self._series_lock = threading.Lock()

    def create(self, config: FinetuneConfig, task_id: str | None = None) -> str:
        """Check the configuration without loading a model, create the run directory, and return the run's id.

        task_id: id of the new run; default: a random id.
        Raises DatasetError, ModelError or OutputError. Raises ConfigError if the method or a tracker cannot be used, or if
        the run cannot continue from the given checkpoint.
        """
        parse = parser_of(config.method)
        if config.method != "sft":
            check_method(config, self._allow_reward_files)
        check_trackers(config.report_to or ())
        for dataset in config.sources:
            check_dataset(dataset.path, _CHECKED_SAMPLES, parse).raise_for_faults()
        if config.eval_path:
            check_dataset(Path(config.eval_path), _CHECKED_SAMPLES, parse, "validation").raise_for_faults()
        source = resolve_model(config.base_model)
        if source.base and config.finetuning_type == "full":
            raise ModelError(
                code="base_is_adapter",
                message=f"{config.base_model} is an adapter, and full fine-tuning needs a whole model.",
                hint="Omit --finetuning-type to train the adapter further.",
                param="base_model",
            )
        if source.base and source.base.kind is ModelKind.ADAPTER:
            raise ModelError(
                code="base_is_adapter",
                message=f"{config.base_model} is an adapter whose base is an adapter too. Training such an adapter further "
                "is not supported.",
                hint=f"Use {source.base.name} or its base model instead.",
                param="base_model",
            )
        task_id = task_id or f"task-{random_suffix()}"
        run, output = RunDirectory(self.root / task_id), Path(config.output_dir)
        check_claim(output, task_id)
        spec = RunSpec(task_id, config, data_hash(config), datetime.now(UTC).isoformat())
        if config.resume_from_checkpoint:
            checkpoint = Checkpoint.of(Path(config.resume_from_checkpoint))
            checkpoint.check_can_continue(config, spec.dataset_sha256, lambda name: resolve_model(name).folder)
        run.create(spec)
        try:
            claim_output(output, task_id, run.path)
        except OutputError:
            shutil.rmtree(run.path)
            raise
        return task_id

    def fork(self, parent_id: str, step: int | None, options: Mapping[str, Any], task_id: str | None = None) -> str:
        """Create a run that continues from a checkpoint of another run, and return the id of the new run.

        step: step of the checkpoint; None: the newest checkpoint.
        options: the options of the new run that differ from the options of the other run.
        task_id: id of the new run; default: a random id.
        Raises SageError. After an error, no files of the new run remain.
        """
        parent, task_id = self.run_directory(parent_id), task_id or f"task-{random_suffix()}"
        run, checkpoint = RunDirectory(self.root / task_id), checkpoint_to_fork(parent, step)
        spec = replace(fork_spec(parent, task_id, checkpoint, options), created_at=datetime.now(UTC).isoformat())
        check_claim(Path(spec.config.output_dir), task_id)
        run.create(spec, lambda folder: copy_history(parent, checkpoint, folder))
        try:
            check_data(task_id, spec)
            claim_output(Path(spec.config.output_dir), task_id, run.path)
        except SageError:
            shutil.rmtree(run.path)
            raise
        return task_id

    def start_training(self, task_id: str) -> ProcessIdentity:
        """Start the worker of a run. If the run has checkpoints, it continues from the newest checkpoint.

        Raises Conflict if the run already has a process.
        """
        return spawn(self.process_spec(task_id))

    def process_spec(self, task_id: str) -> ProcessSpec:
        """Append the event `launched`, and return the specification of the worker process.

        Raises Conflict if the run already has a process.
        """
        run = self.run_directory(task_id)
        if not self._wait_for_exit(task_id):
            raise Conflict(code="already_running", message=f"{task_id} is already running.")
        run.append_event(LaunchedEvent())
        argv = (sys.executable, "-m", "sage.libs.finetune.worker", str(run.path))
        environment = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
        return ProcessSpec(argv, run.lock_path, run.log_path, environment, holds_sigterm=True)

    def resume(self, task_id: str) -> ProcessIdentity:
        """Start a stopped or failed run again.

        Raises Conflict if the run is running or completed, or if its data has changed. Raises OutputError if the run's
        output folder belongs to another run.
        """
        self.check_resumable(task_id)
        return self.start_training(task_id)

    def check_resumable(self, task_id: str) -> None:
        """Raise Conflict or OutputError if the run cannot be resumed."""
        self.check_resumable_quick(task_id)
        check_data(task_id, self.run_directory(task_id).read_spec())

    def check_resumable_quick(self, task_id: str) -> None:
        """Raise Conflict or OutputError if the run cannot be resumed. The data is not checked for changes."""
        state, spec = self.status(task_id).state, self.run_directory(task_id).read_spec()
        if state is RunState.COMPLETED:
            raise Conflict(
                code="not_resumable",
                message=f"{task_id} is completed: its result is in {spec.config.output_dir}.",
                hint="To train further, start a new run with another output folder.",
            )
        if state in ALIVE:
            raise Conflict(code="not_resumable", message=f"{task_id} is running.", hint="There is nothing to resume.")
        check_claim(Path(spec.config.output_dir), task_id)

    def stop(self, task_id: str, *, force: bool = False) -> bool:
        """Ask a run to save a checkpoint and exit, without waiting for the exit. Return False if the run has no process.

        force: kill the process instead; no checkpoint is saved.
        """
        process = self.process(task_id)
        return process.send_signal(signal.SIGKILL if force else signal.SIGTERM) if process else False

    def request_checkpoint(self, task_id: str) -> None:
        """Ask a run to save a checkpoint after its current step, without waiting for the checkpoint."""
        self.run_directory(task_id).request_checkpoint()

    def change_options(self, task_id: str, options: TrainingOptions) -> int:
        """Request other options for the run's next steps, without waiting for the change. Return the request's revision.

        If the run has no process, the options change when the run is resumed. Raises ConfigError or Conflict.
        """
        run, status = self.run_directory(task_id), self.status(task_id)
        check_change(task_id, run.read_spec().config, status, options)
        return request_change(run, options)

    def publish_checkpoint(self, task_id: str, step: int) -> Path:
        """Link a checkpoint's adapter and tokenizer into a folder, and return the folder.

        The folder remains when the run removes the checkpoint.
        Raises ModelError if the checkpoint contains no adapter, and OSError if the checkpoint was removed.
        """
        return publish_checkpoint(self.run_directory(task_id), step)

    def status(self, task_id: str) -> RunStatus:
        """Return the status of a run."""
        run = self.run_directory(task_id)
        # Look for the process before reading the events. If the process exits in between, its last event is still read.
        alive = holder(run.lock_path) is not None
        summary = catch_up(run, self._status_cache.get(task_id) or read_summary(run))
        self._status_cache[task_id] = summary
        return derive(summary.status, alive=alive)

    def process(self, task_id: str) -> ProcessIdentity | None:
        """Return the process of a run, or None if the run has no process."""
        return holder(RunDirectory(self.root / task_id).lock_path)

    def events(self, task_id: str, offset: int = 0) -> Iterator[tuple[AnyRunEvent, int]]:
        """Yield a run's events after byte `offset` of the event file, each with the byte offset at which the event ends."""
        return self.run_directory(task_id).read_events(offset)

    def training_steps(self, task_id: str, after: int = 0, max_points: int | None = None) -> Sequence[TrainingStep]:
        """Return the steps of a run after step `after`, downsampled to at most `max_points` steps."""
        run = self.run_directory(task_id)
        with self._series_lock:  # concurrent requests for the same run use the same StepSeries
            series = self._series.pop(task_id, None) or StepSeries(run)
            while len(self._series) >= _KEPT_SERIES:
                del self._series[next(iter(self._series))]
            self._series[task_id] = series
        return series.read(after, max_points)

    def logs(self, task_id: str, tail: int = 100) -> list[str]:
        """Return the last `tail` lines of a run's log."""
        return tail_lines(self.run_directory(task_id).log_path, tail)

    def list(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        begun: list[tuple[float, str]] = []
        for spec in self.root.glob("*/spec.json"):
            with contextlib.suppress(FileNotFoundError):  # the run was removed in the meantime
                begun.append((spec.stat().st_mtime, spec.parent.name))
        return [name for _, name in sorted(begun)]

    def delete(self, task_id: str) -> None:
        """Remove a run's directory and checkpoints, but not the output folder; raises Conflict if the run is running."""
        if not self._wait_for_exit(task_id):
            raise Conflict(code="still_running", message=f"{task_id} is running.", hint="Stop the run first.")
        shutil.rmtree(self.run_directory(task_id).path)
        self._status_cache.pop(task_id, None)
        with self._series_lock:
            self._series.pop(task_id, None)

    def _wait_for_exit(self, task_id: str) -> bool:
        """Return whether a run has no process. If the run has ended, first wait up to 10 s for the exit of its process."""
        deadline = time.monotonic() + _EXIT_SECONDS
        while self.process(task_id):
            if self.status(task_id).state in ALIVE or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def run_directory(self, task_id: str) -> RunDirectory:
        """Return the directory of a run; raises NotFound if the run does not exist."""
        run = RunDirectory(self.root / task_id)
        if not run.spec_path.is_file():
            known = json.dumps(self.list()[-5:])
            raise NotFound(
                code="task_not_found",
                message=f"The folder {self.root} contains no task '{task_id}'.",
                hint=f"The newest tasks are: {known}.",
            )
        return run
