"""Engines of kind finetune: a training run in a process of its own.

`FinetuneEngine` is one run, usable on its own from Python; `FinetuneExecutor` is what the control plane drives.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sage.common.errors import ConfigError, Conflict, NotFound
from sage.common.identity import ProcessIdentity
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import ALIVE, RunState, RunStatus
from sage.llm.client.types import EngineState, Reason, StartRequest, TrainingProgress, TrainingStep
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.executors.last_words import last_words
from sage.llm.control_plane.inventory import gpu_memory_of
from sage.llm.control_plane.launchers.base import Launcher
from sage.llm.control_plane.store.store import EngineRecord

_POLL_SECONDS = 0.1
_SETTLED = (RunState.STOPPED, RunState.COMPLETED, RunState.FAILED)
#: Options that name files: the gateway works in another folder than whoever gives them.
_PATHS = ("dataset_path", "output_dir", "eval_path", "resume_from_checkpoint", "reward_file")
#: What reading a run raises if its files are not there, or hold something else than events.
_UNREADABLE = (NotFound, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class FinetuneEngineConfig:
    """Configuration for fine-tune engine."""

    base_model: str
    dataset_path: str
    output_dir: str
    lora_rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 1e-4
    num_epochs: int = 3
    batch_size: int = 4
    max_seq_length: int = 512
    use_8bit: bool = True
    resume_from_checkpoint: str | None = None


class FinetuneEngine:
    """Fine-tune engine managed by Control Plane."""

    engine_kind = "finetune"

    def __init__(self, config: FinetuneEngineConfig | FinetuneConfig, task_id: str | None = None) -> None:
        """config: the short form, or FinetuneConfig with every option; task_id: of a run that exists, or shall."""
        self.config = config
        self.manager = FinetuneManager()
        self.task_id: str | None = task_id
        self.status = "not_started"

    async def create(self) -> str:
        """Check everything that needs no model, write the run's directory, and return the task's id.

        Raises ConfigError, DatasetError, ModelError or OutputError; then nothing was started.
        """
        config = self.config
        if not isinstance(config, FinetuneConfig):
            config = validated(FinetuneConfig, asdict(config))
        self.task_id = await asyncio.to_thread(self.manager.create, config, self.task_id)
        return self.task_id

    async def start(self) -> dict[str, Any]:
        """Start the run, or go on with it from its newest checkpoint; return task_id and status."""
        if self.task_id is None:
            await self.create()
        assert self.task_id is not None
        await asyncio.to_thread(self.manager.start_training, self.task_id)
        return await self.get_status()

    async def stop(self) -> dict[str, Any]:
        """Stop training, wait until checkpoint and adapter are saved, and return the status.

        Stopping what has ended already changes nothing.
        """
        await self.request_stop()
        status = await self.get_status()
        while status["status"] in ALIVE:
            await asyncio.sleep(_POLL_SECONDS)
            status = await self.get_status()
        return status

    async def request_stop(self, *, force: bool = False) -> None:
        """Ask the run to save and end (`force`: kill it), without waiting for it."""
        await asyncio.to_thread(self.manager.stop, self._task(), force=force)

    async def get_status(self) -> dict[str, Any]:
        """Return status, progress, loss, ETA and memory; None stands for what is not known yet."""
        task_id = self._task()
        run = await asyncio.to_thread(self.manager.status, task_id)
        self.status = run.state.value
        process = await asyncio.to_thread(self.manager.process, task_id)
        return {
            "task_id": task_id,
            "status": run.state,
            **_progress(run).model_dump(),
            "memory_bytes": run.memory_bytes,
            "gpu_memory_bytes": gpu_memory_of(process.pid) if process else None,
            "reason": _reason(run),
        }

    async def get_logs(self, tail: int = 100) -> list[str]:
        """Return the last lines of the training log."""
        return await asyncio.to_thread(self.manager.logs, self._task(), tail)

    def _task(self) -> str:
        if self.task_id is None:
            raise Conflict(code="not_started", message="The fine-tune engine was not started.", hint="`start()` it.")
        return self.task_id


class FinetuneExecutor:
    """Drives FinetuneEngine for the control plane; an engine and its run share the end of their ids."""

    def __init__(self, launcher: Launcher) -> None:
        self._manager = FinetuneManager()
        self._launcher = launcher

    async def prepare(self, engine_id: str, request: StartRequest) -> dict[str, Any]:
        """Check the request and write the run's directory."""
        if request.port:
            raise Conflict(code="no_port", message="A finetune engine has no port.", hint="Omit --port.")
        _check_paths(request.options)
        config = validated(FinetuneConfig, {**request.options, "base_model": request.model})
        await FinetuneEngine(config, task_id_of(engine_id)).create()
        return config.model_dump(mode="json")

    async def discard(self, engine_id: str) -> None:
        """Remove the run's directory, which would hold its output folder for ever."""
        with contextlib.suppress(NotFound):
            await asyncio.to_thread(self._manager.delete, task_id_of(engine_id))

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict if the run is completed, or its dataset has changed."""
        observed = await self.observe(engine)
        if observed.alive and not observed.ended:
            return  # it is adopted
        await asyncio.to_thread(self._manager.check_resumable, task_id_of(engine.id))

    async def launch(self, engine: EngineRecord) -> None:
        """Start the worker."""
        await self._engine(engine).start()

    async def port(self, engine: EngineRecord) -> None:
        """It has none."""

    async def observe(self, engine: EngineRecord) -> Observed:
        """Return where the run is, from its events and its lock."""
        observed = await self._observe_run(engine)
        # Asked last: what is gone by now has left all that it leaves.
        if await asyncio.to_thread(self._launcher.has_leftovers, self._run(engine).lock_path):
            return Observed(alive=True, orphaned=True)
        return observed

    async def _observe_run(self, engine: EngineRecord) -> Observed:
        lock = self._run(engine).lock_path
        try:
            run = await asyncio.to_thread(self._manager.status, task_id_of(engine.id))
        except _UNREADABLE as error:  # whether it lives is seen without its events
            alive = await asyncio.to_thread(self._launcher.observe, lock) is not None
            return Observed(alive=alive, ready=alive, reason=_unreadable(error))
        if run.state in _SETTLED:
            alive = await asyncio.to_thread(self._launcher.observe, lock) is not None
            reason = await asyncio.to_thread(self._why_it_died, engine, run) if run.code == "worker_died" else _reason(run)
            return Observed(alive=alive, ended=EngineState(run.state.value), reason=reason)
        return Observed(alive=run.state is not RunState.CREATED, ready=run.state is RunState.RUNNING)

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        """Ask the worker to save and end, or kill its session."""
        await asyncio.to_thread(self._launcher.kill if force else self._launcher.stop, self._run(engine).lock_path)

    def process(self, engine: EngineRecord) -> ProcessIdentity | None:
        """Return the worker, or None."""
        return self._manager.process(task_id_of(engine.id))

    async def describe(self, engine: EngineRecord) -> dict[str, Any]:
        """Return the run's progress and places."""
        task_id = task_id_of(engine.id)
        places = {
            "task_id": task_id,
            "output_dir": engine.options["output_dir"],
            "run_dir": str(self._manager.root / task_id),
        }
        with contextlib.suppress(NotFound):  # its run directory was removed by hand
            run = await asyncio.to_thread(self._manager.status, task_id)
            return {**places, "training": _progress(run)}
        return places

    async def training_steps(self, engine: EngineRecord) -> list[TrainingStep]:
        """Return the run's steps; of one that was done again after a kill, the last word."""
        events, _ = await asyncio.to_thread(self._manager.events, task_id_of(engine.id))
        steps = {}
        for event in events:
            with contextlib.suppress(ValidationError):  # one malformed event is not worth all others
                if event["event"] == "step":
                    step = TrainingStep.model_validate(event)
                    steps[step.step] = step
        return [steps[step] for step in sorted(steps)]

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the worker's log."""
        return self._run(engine).log_path

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the run's directory with its checkpoints; the output folder stays."""
        await asyncio.to_thread(self._manager.delete, task_id_of(engine.id))

    def _run(self, engine: EngineRecord) -> RunDirectory:
        return RunDirectory(self._manager.root / task_id_of(engine.id))

    def _why_it_died(self, engine: EngineRecord, run: RunStatus) -> Reason:
        """Return why a worker exited without reporting an error."""
        code = self._launcher.exit_code(self._run(engine).lock_path)
        if code is None or code == 0:
            return Reason(code="worker_died", message=run.message or "", hint=run.hint or "")
        message = last_words(f"At step {run.step}, the training process", code, self._run(engine).log_path)
        return Reason(code="worker_died", message=message, hint=run.hint or "")

    @staticmethod
    def _engine(engine: EngineRecord) -> FinetuneEngine:
        return FinetuneEngine(FinetuneConfig.model_validate(engine.options), task_id_of(engine.id))


def _check_paths(options: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option names a file by a relative path."""
    for name in _PATHS:
        given = options.get(name) or []
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, str) and not path.startswith("/"):
                raise ConfigError(
                    code="path_not_absolute",
                    message=f"{name}: '{path[:200]}' is not an absolute path, and the gateway works in another folder.",
                    hint=f"Give the absolute path of '{name}'.",
                    param=name,
                )


def task_id_of(engine_id: str) -> str:
    """Return the id of an engine's run."""
    return f"task-{engine_id.removeprefix('engine-')}"


def _progress(run: RunStatus) -> TrainingProgress:
    return TrainingProgress(
        step=run.step,
        total_steps=run.total_steps,
        progress=run.progress,
        epoch=run.epoch,
        loss=run.loss,
        token_accuracy=run.token_accuracy,
        reward=run.reward,
        reward_accuracy=run.reward_accuracy,
        learning_rate=run.learning_rate,
        grad_norm=run.grad_norm,
        tokens_per_second=run.tokens_per_second,
        eta_seconds=run.eta_seconds,
        checkpoint_step=run.checkpoint_step,
        heldout_loss_before=run.heldout_loss_before,
        heldout_loss=run.heldout_loss,
        activity=run.message if run.state in ALIVE else None,
        warnings=list(run.warnings),
    )


def _unreadable(error: Exception) -> Reason:
    if isinstance(error, NotFound):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    return Reason(
        code="run_unreadable",
        message=f"The run's events cannot be read: {type(error).__name__}: {error}.",
        hint="Fix or remove the line at fault in events.jsonl of its run directory.",
    )


def _reason(run: RunStatus) -> Reason | None:
    if run.state is not RunState.FAILED:
        return None
    return Reason(code=run.code or "failed", message=run.message or "It failed.", hint=run.hint or "")
