"""The executor for engines of kind finetune: training runs, each in its own process."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage.common.errors import Conflict, NotFound
from sage.common.processes import ProcessSpec
from sage.common.training import TrainingOptions, TrainingProgress, TrainingStep
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.run.disk import check_start
from sage.libs.finetune.run.output import check_claim
from sage.libs.finetune.run.reservation import RESERVED_VARIABLE
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import ALIVE, RunState, RunStatus
from sage.libs.models.resolve import resolve_model
from sage.llm.client.types import SETTLED as SETTLED_ENGINE
from sage.llm.client.types import EngineState, Reason, StartRequest
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.datasets import FILE_ID, DatasetResolver, LocalDatasets, check_absolute
from sage.llm.control_plane.executors.base import Observed, Prepared, planned_server, server_id_of
from sage.llm.control_plane.executors.exit_message import exit_message
from sage.llm.control_plane.executors.finetune_engine import FinetuneEngine, FinetuneEngineConfig
from sage.llm.control_plane.executors.runs import SETTLED, UNREADABLE, crash_of, failure_of, unreadable
from sage.llm.control_plane.launchers.base import Launcher, ProcessObservation
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState, suffix_of

__all__ = ["FinetuneEngine", "FinetuneEngineConfig", "FinetuneExecutor"]

#: `_DATASETS`: options that name datasets. `_PATHS`: options that name other files or folders.
_DATASETS = ("dataset_path", "eval_path")
_PATHS = ("output_dir", "resume_from_checkpoint", "reward_file")


class FinetuneExecutor:
    """Runs training with `FinetuneManager`. An engine and its run have ids with the same suffix."""

    def __init__(
        self,
        launcher: Launcher,
        datasets: DatasetResolver | None = None,
        *,
        allow_reward_files: bool = False,
        threads: int | None = None,
    ) -> None:
        """threads: number of CPU threads of each run. None: the number in the record of the run's engine."""
        self._threads = threads
        self._manager = FinetuneManager(allow_reward_files=allow_reward_files)
        self._launcher = launcher
        self._datasets = datasets or LocalDatasets()
        self._reading = Pool("read-runs", 2)
        self._reading_steps = Pool("read-steps", 1)  # reading many steps must not delay probes

    async def prepare(self, engine_id: str, request: StartRequest) -> Prepared:
        """Check the options, and check that the model and the datasets exist. Raises SageError."""
        if request.port:
            raise Conflict(code="no_port", message="An engine of kind finetune has no port.", hint="Omit --port.")
        return await asyncio.to_thread(self._prepare, engine_id, request)

    async def validate(self, engine: EngineRecord) -> Mapping[str, Any]:
        """Create the directory of a new run. For an existing run without a process, check that the run can be resumed."""
        if not await self._is_alive(engine):
            await asyncio.to_thread(self._validate, engine)
        return {}

    async def discard(self, engine_id: str) -> None:
        """Remove the run directory if it exists, so that another run can use the same output folder."""
        with contextlib.suppress(NotFound):
            await asyncio.to_thread(self._manager.delete, task_id_of(engine_id))

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the run is completed, and OutputError if the run's output folder belongs to another run."""
        was_launched = engine.server_id is not None  # before its first launch, a run possibly has no directory
        if (was_launched or self._run(engine).spec_path.exists()) and not await self._is_alive(engine):
            await asyncio.to_thread(self._manager.check_resumable_quick, task_id_of(engine.id))

    def spec(self, engine: EngineRecord, server: ServerRecord) -> ProcessSpec:
        """Return the specification of the worker process, and record the launch of the worker in the run's events."""
        spec = self._manager.process_spec(task_id_of(engine.id))
        values = {"OMP_NUM_THREADS": self._threads or engine.threads, RESERVED_VARIABLE: server.reserved_bytes}
        given = {name: str(value) for name, value in values.items() if value}
        return dataclasses.replace(spec, env={**spec.env, **given})

    def plan_server(self, engine: EngineRecord, *, is_moved: bool = False) -> ServerRecord:
        """Return the record of a new server. The server is the worker process of the run."""
        return planned_server(engine, server_id_of(engine), self._handle(engine))

    async def probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed:
        """Read the events of a run, and return the condition of the run.  process: the observation of the run's process."""
        if process.leftovers:
            return Observed(alive=True, orphaned=True, process=process)
        return await self._reading.run(self._probe, engine, server, process)

    def view_fields(self, engine: EngineRecord, observed: Observed | None) -> Mapping[str, Any]:
        """Return the run's folders and progress."""
        return {
            "task_id": task_id_of(engine.id),
            "output_dir": engine.options["output_dir"],
            "run_dir": str(self._run(engine).path),
            "served_by": engine.serve and engine.serve["engine_id"],
            "training": self._training(engine, observed),
        }

    async def training_steps(self, engine: EngineRecord, after: int, max_points: int | None) -> list[TrainingStep]:
        """Return the run's steps after step `after`, downsampled to at most `max_points`."""
        steps = await self._reading_steps.run(self._manager.training_steps, task_id_of(engine.id), after, max_points)
        return list(steps)

    async def checkpoint_step(self, engine: EngineRecord) -> int:
        """Return the step of the run's newest checkpoint, or 0 if the run has no checkpoint."""
        return (await asyncio.to_thread(self._manager.status, task_id_of(engine.id))).checkpoint_step or 0

    async def request_checkpoint(self, engine: EngineRecord) -> None:
        """Ask the run to save a checkpoint after its current step."""
        await asyncio.to_thread(self._manager.request_checkpoint, task_id_of(engine.id))

    async def change_options(self, engine: EngineRecord, options: TrainingOptions) -> int:
        """Request new option values for the run's next steps. Return the sequence number of the request.

        Raises SageError.
        """
        return await asyncio.to_thread(self._manager.change_options, task_id_of(engine.id), options)

    async def fork(self, engine: EngineRecord, fork_id: str, step: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Create the run directory of a fork, and return the configuration of the fork. Raises SageError."""
        task_id = task_id_of(fork_id)
        given = self._absolute(options)
        await asyncio.to_thread(self._manager.fork, task_id_of(engine.id), step, given, task_id)
        spec = await asyncio.to_thread(self._manager.run_directory(task_id).read_spec)
        return spec.config.model_dump(mode="json")

    async def publish_checkpoint(self, engine: EngineRecord, step: int) -> Path:
        """Return a folder that contains a checkpoint as a model that can be served.

        The folder remains when the run removes the checkpoint. Raises ModelError or OSError.
        """
        return await asyncio.to_thread(self._manager.publish_checkpoint, task_id_of(engine.id), step)

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the path of the worker's log."""
        return self._run(engine).log_path

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the run directory with its checkpoints."""
        await self.discard(engine.id)

    def _prepare(self, engine_id: str, request: StartRequest) -> Prepared:
        config = validated(FinetuneConfig, self._absolute(request.options) | {"base_model": request.model})
        for source in config.sources:
            self._datasets.resolve(str(source.path))
        if config.eval_path:
            self._datasets.resolve(config.eval_path)
        model = resolve_model(request.model)
        backend, _ = registry.resolve(request.backend, request.engine_kind, model)
        check_claim(Path(config.output_dir), task_id_of(engine_id))
        estimate = backend.estimate(model, config)
        if estimate:
            check_start(config, estimate.breakdown.parts()["adapter"], self._manager.root)
        return Prepared(
            backend.name,
            config.model_dump(mode="json"),
            reserved_bytes=estimate.total_bytes if estimate else None,
            least_bytes=estimate.least_bytes if estimate else None,
        )

    def _absolute(self, options: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: options[name] for name in (*_DATASETS, *_PATHS) if options.get(name)}
        checked = {
            name: [self._path(name, path) for path in paths] if isinstance(paths, list) else self._path(name, paths)
            for name, paths in given.items()
        }
        return {**options, **checked}

    def _path(self, option: str, given: Any) -> Any:
        if not isinstance(given, str):
            return given  # `validated` reports the wrong type
        if option in _DATASETS and given.startswith(FILE_ID):
            return str(self._datasets.resolve(given))
        check_absolute(option, given)
        return given

    def _validate(self, engine: EngineRecord) -> None:
        task_id = task_id_of(engine.id)
        if engine.server_id is None and not self._run(engine).spec_path.exists():
            self._manager.create(FinetuneConfig.model_validate(engine.options), task_id)
        else:
            self._manager.check_resumable(task_id)

    def _probe(self, engine: EngineRecord, server: ServerRecord, process: ProcessObservation) -> Observed:
        try:
            run = self._manager.status(task_id_of(engine.id))
        except UNREADABLE as error:  # the events cannot be read, so report only the state of the process
            return Observed(alive=process.alive, ready=process.alive, reason=unreadable(error), process=process)
        training = run.training_progress()
        # Until a planned launch has happened, the newest events are from the previous launch, so they are ignored. The
        # events of a completed run are never ignored, because a completed run is not launched again.
        is_earlier = server.state is ServerState.PLANNED and not process.alive and run.state is not RunState.COMPLETED
        if run.state in SETTLED and not is_earlier:
            reason = self._exit_reason(engine, run, process) if run.code == "worker_died" else failure_of(run)
            ended, crash = EngineState(run.state.value), crash_of(run)
            return Observed(process.alive, ended=ended, reason=reason, process=process, training=training, crash=crash)
        # `status` checked the run's lock after `process` was observed. A worker that was launched between these two checks
        # must also count as alive.
        alive = process.alive or run.state in ALIVE
        return Observed(alive=alive, ready=run.state is RunState.RUNNING, process=process, training=training)

    def _exit_reason(self, engine: EngineRecord, run: RunStatus, process: ProcessObservation) -> Reason:
        message = run.message or ""
        if process.exit_code:
            what = f"At step {run.step}, the training process"
            message = exit_message(what, process.exit_code, self._run(engine).log_path)
        return Reason(code="worker_died", message=message, hint=run.hint or "")

    def _training(self, engine: EngineRecord, observed: Observed | None) -> TrainingProgress | None:
        if observed and observed.training:
            return observed.training
        if engine.figures is not None and engine.state in SETTLED_ENGINE:
            return TrainingProgress.model_validate(engine.figures)
        with contextlib.suppress(*UNREADABLE):
            return self._manager.status(task_id_of(engine.id)).training_progress()
        return None

    async def _is_alive(self, engine: EngineRecord) -> bool:
        handle = self._handle(engine)
        process = (await self._launcher.observe([handle])).get(handle)
        return process is not None and process.alive

    def _handle(self, engine: EngineRecord) -> str:
        run = self._run(engine)
        return self._launcher.handle(ProcessSpec((), run.lock_path, run.log_path))

    def _run(self, engine: EngineRecord) -> RunDirectory:
        return RunDirectory(self._manager.root / task_id_of(engine.id))


def task_id_of(engine_id: str) -> str:
    """Return the task id of an engine's run."""
    return f"task-{suffix_of(engine_id)}"
