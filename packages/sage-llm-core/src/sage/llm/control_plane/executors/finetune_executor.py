"""Engines of kind finetune: a training run in a process of its own.

`FinetuneEngine` is one run, usable on its own from Python; `FinetuneExecutor` is what the control plane drives, and does
everything through it.
"""

import asyncio
import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage.common.errors import Conflict, NotFound
from sage.common.processes import ProcessIdentity
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.rundir import RunDirectory
from sage.libs.finetune.status import ALIVE, RunState, RunStatus
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.inventory import gpu_memory_of
from sage.llm.control_plane.states import EngineState
from sage.llm.control_plane.store.store import EngineRecord
from sage.llm.control_plane.types import Reason, StartRequest, TrainingProgress, TrainingStep

_POLL_SECONDS = 0.1
_SETTLED = (RunState.STOPPED, RunState.COMPLETED, RunState.FAILED)


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
        await asyncio.to_thread(self.manager.start, self.task_id)
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

    def __init__(self) -> None:
        self._manager = FinetuneManager()

    async def prepare(self, engine_id: str, request: StartRequest) -> dict[str, Any]:
        """Check the request and write the run's directory."""
        if request.port:
            raise Conflict(code="no_port", message="A finetune engine has no port.", hint="Leave --port away.")
        config = validated(FinetuneConfig, {**request.options, "base_model": request.model})
        await FinetuneEngine(config, task_id_of(engine_id)).create()
        return config.model_dump(mode="json")

    async def check_resumable(self, engine: EngineRecord) -> None:
        """Raise Conflict where the run is completed, or its dataset has changed."""
        await asyncio.to_thread(self._manager.check_resumable, task_id_of(engine.id))

    async def launch(self, engine: EngineRecord) -> None:
        """Start the worker, unless it lives already."""
        if not (await self.observe(engine)).alive:
            await self._engine(engine).start()

    async def observe(self, engine: EngineRecord) -> Observed:
        """Return where the run is, from its events and its lock."""
        run = await asyncio.to_thread(self._manager.status, task_id_of(engine.id))
        if run.state in _SETTLED:
            return Observed(alive=False, ended=EngineState(run.state.value), reason=_reason(run))
        return Observed(alive=run.state is not RunState.CREATED, ready=run.state is RunState.RUNNING)

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        """Ask the worker to save and end."""
        await self._engine(engine).request_stop(force=force)

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
        steps = {event["step"]: TrainingStep.model_validate(event) for event in events if event["event"] == "step"}
        return [steps[step] for step in sorted(steps)]

    def log_path(self, engine: EngineRecord) -> Path:
        """Return the worker's log."""
        return RunDirectory(self._manager.root / task_id_of(engine.id)).log_path

    async def remove(self, engine: EngineRecord) -> None:
        """Remove the run's directory with its checkpoints; the output folder stays."""
        await asyncio.to_thread(self._manager.delete, task_id_of(engine.id))

    @staticmethod
    def _engine(engine: EngineRecord) -> FinetuneEngine:
        return FinetuneEngine(FinetuneConfig.model_validate(engine.options), task_id_of(engine.id))


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


def _reason(run: RunStatus) -> Reason | None:
    if run.state is not RunState.FAILED:
        return None
    return Reason(code=run.code or "failed", message=run.message or "It failed.", hint=run.hint or "")
