"""`FinetuneEngine`: control one training run from a Python program, without a control plane."""

import asyncio
from dataclasses import asdict, dataclass
from typing import Any

from sage.common.errors import Conflict
from sage.common.processes import ProcessSpec
from sage.common.settings import load_settings
from sage.common.validation import validated
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.manager import FinetuneManager
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import ALIVE
from sage.llm.control_plane.executors.runs import failure_of
from sage.llm.control_plane.inventory import gpu_memory_of
from sage.llm.control_plane.launchers.base import Launcher, Signal
from sage.llm.control_plane.launchers.local import LocalLauncher

_POLL_SECONDS = 0.1


@dataclass
class FinetuneEngineConfig:
    """The basic options of a training run."""

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
    """Starts, stops and observes one training run."""

    engine_kind = "finetune"

    def __init__(
        self,
        config: FinetuneEngineConfig | FinetuneConfig,
        task_id: str | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        """Store the configuration of a run.

        task_id: id of an existing run, or the id for a new run. None: a new run gets a random id.
        launcher: starts and observes the process of the run. None: a LocalLauncher.
        """
        self.config = config
        self.manager = FinetuneManager(allow_reward_files=load_settings().allow_reward_files)
        self.task_id: str | None = task_id
        self.status = "not_started"
        self._launcher = launcher or LocalLauncher()

    async def create(self) -> str:
        """Run the checks that do not load the model, create the run directory, and return the task id.

        If a check fails, raises ConfigError, DatasetError, ModelError or OutputError, and creates no run directory.
        """
        config = self.config
        if not isinstance(config, FinetuneConfig):
            config = validated(FinetuneConfig, asdict(config))
        self.task_id = await asyncio.to_thread(self.manager.create, config, self.task_id)
        return self.task_id

    async def start(self) -> dict[str, Any]:
        """Start the run, or resume it from its newest checkpoint."""
        task_id = self.task_id or await self.create()
        await self._launcher.launch(await asyncio.to_thread(self.manager.process_spec, task_id))
        return await self.get_status()

    async def stop(self) -> dict[str, Any]:
        """Stop training, wait until the checkpoint and the adapter are saved, and return the status.

        A run that has ended is not changed.
        """
        await self._launcher.signal(self._handle(), Signal.STOP)
        status = await self.get_status()
        while status["status"] in ALIVE:
            await asyncio.sleep(_POLL_SECONDS)
            status = await self.get_status()
        return status

    async def get_status(self) -> dict[str, Any]:
        """Return a dictionary with status, progress, loss, ETA and memory. Values that are not known are None."""
        handle = self._handle()
        run = await asyncio.to_thread(self.manager.status, self._task())
        self.status = run.state.value
        process = (await self._launcher.observe([handle])).get(handle)
        return {
            "task_id": self.task_id,
            "status": run.state,
            **run.training_progress().model_dump(),
            "gpu_memory_bytes": gpu_memory_of(process.pid) if process and process.pid else None,
            "reason": failure_of(run),
        }

    async def get_logs(self, tail: int = 100) -> list[str]:
        """Return the last lines of the training log."""
        return await asyncio.to_thread(self.manager.logs, self._task(), tail)

    def _handle(self) -> str:
        run = RunDirectory(self.manager.root / self._task())
        return self._launcher.handle(ProcessSpec((), run.lock_path, run.log_path))

    def _task(self) -> str:
        if self.task_id is None:
            raise Conflict(code="not_started", message="The fine-tune engine was not started.", hint="Call `start()` first.")
        return self.task_id
