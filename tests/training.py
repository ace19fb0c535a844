"""Training runs of the tiny model, for tests."""

import json
from pathlib import Path
from typing import Any

from support import SAMPLES, wait_for

from sage.common.settings import load_settings
from sage.libs.finetune import FinetuneConfig, FinetuneManager
from sage.libs.finetune.run.status import RunState, RunStatus
from sage.libs.finetune.training.stopping import StopRequest

ENDED = (RunState.STOPPED, RunState.COMPLETED, RunState.FAILED)


class TinyRun:
    """A training run of the tiny model."""

    def __init__(self, model: Path, output: Path, **options: Any) -> None:
        # The precision is fixed. With `auto`, two runs on a busy machine could choose different precisions.
        values = {
            "dataset_path": str(SAMPLES), "batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "precision": "fp32",
            **options,
        }  # fmt: skip
        self.config = FinetuneConfig(base_model=str(model), output_dir=str(output), **values)
        self.output = output
        self.manager = FinetuneManager(allow_reward_files=load_settings().allow_reward_files)
        self.task_id = self.manager.create(self.config)

    def start(self) -> "TinyRun":
        self.manager.start_training(self.task_id)
        return self

    def trained(self) -> "TinyRun":
        """Train in this process. This is faster than a worker process, which needs seconds to import the libraries."""
        run, stop = self.manager.run_directory(self.task_id), StopRequest()
        if self.config.method == "sft":
            from sage.libs.finetune.training.trainer import TrainingRun as Run
        else:
            from sage.libs.finetune.training.preference import PreferenceRun as Run
        Run(run, stop).train()
        return self.completed()

    @property
    def status(self) -> RunStatus:
        return self.manager.status(self.task_id)

    @property
    def path(self) -> Path:
        return self.manager.run_directory(self.task_id).path

    def at_step(self, step: int) -> "TinyRun":
        wait_for(lambda: self.status.step >= step or self.status.state in ENDED, f"step {step}")
        return self

    def until_ended(self) -> RunStatus:
        wait_for(lambda: self.status.state in ENDED, "the end", 240)  # a slow machine takes more than 120 s
        wait_for(lambda: self.manager.process(self.task_id) is None, "the exit of the process")
        return self.status

    def stopped_at(self, step: int) -> "TinyRun":
        """Start the run, stop it when it has reached the step, and wait until it has stopped."""
        self.start().at_step(step)
        self.manager.stop(self.task_id)
        assert self.until_ended().state is RunState.STOPPED
        return self

    def resumed(self) -> "TinyRun":
        self.manager.resume(self.task_id)
        return self.completed()

    def completed(self) -> "TinyRun":
        status = self.until_ended()
        assert status.state is RunState.COMPLETED, "\n".join([str(status.message), *self.manager.logs(self.task_id)])
        return self

    def events(self, kind: str) -> list[dict[str, Any]]:
        events = (event for event, _ in self.manager.events(self.task_id))
        return [event.model_dump(mode="json") for event in events if event.event == kind]

    def losses(self) -> dict[int, float]:
        """Return the loss of each step. If a step was trained twice, the second loss is returned."""
        return {event["step"]: event["loss"] for event in self.events("step")}

    def adapter_bytes(self) -> bytes:
        return (self.output / "adapter_model.safetensors").read_bytes()

    def run_file(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "sage_run.json").read_text()))
