"""Runs by TRL's methods: DPO, ORPO and KTO learn from what people prefer, GRPO from what a reward function says.

The loop, the losses and the sampling are TRL's; model, checkpoints, events, stop and result are those of every run.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset, disable_progress_bars
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from sage.libs.finetune.data.checking import as_chats
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.preferences import parser_of
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.kernels.install import Kernels
from sage.libs.finetune.run.rewards import load_reward
from sage.libs.finetune.training.heldout import HeldOut
from sage.libs.finetune.training.trainer import TrainingRun

_TRAINERS = {
    "dpo": (DPOConfig, DPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}


def table_of(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows as TRL takes them; a message has the keys that it has, without nulls for those of other messages."""
    return Dataset.from_list(rows, on_mixed_types="use_json")


class PreferenceRun(TrainingRun):
    """A run whose trainer is TRL's."""

    def _load_data(self) -> None:
        disable_progress_bars()
        config = self.config
        self.rows: list[dict[str, Any]] = []
        for source in config.sources:
            self._tell(f"reading {source.path}")
            report = DatasetReport(source.path)
            samples = list(read_samples(report, parser_of(config.method)))
            report.raise_for_faults()
            self._inspect(samples, report.path)
            self.rows += [sample.content for sample in samples]
        self.samples, self.micro_batch = len(self.rows), config.batch_size
        self.heldout = HeldOut(self.run, config, [], self.stop.check)

    def _inspect(self, samples: list[Sample], path: Path) -> None:
        """Look at the answers of a dataset as the model would see them."""
        encoder = self._encoder()
        for sample in as_chats(samples):
            encoder.encode_whole([sample])
        encoder.raise_for_faults()
        self._report_findings(encoder.findings, path)

    def _install_kernels(self) -> tuple[Kernels | None, str]:
        return None, f"plain: {self.config.method} is TRL's own"

    def _trainer(self) -> Trainer:
        config = self.config
        options: dict[str, Any] = {
            **self._arguments(),
            "bf16": self.precision.bf16,
            "gradient_checkpointing": config.gradient_checkpointing == "on",
            **({} if config.beta is None else {"beta": config.beta}),
        }
        more: dict[str, Any] = {}
        if config.method == "grpo":
            assert config.reward_file
            options |= {"num_generations": config.num_generations, "max_completion_length": config.max_completion_length}
            more["reward_funcs"] = load_reward(Path(config.reward_file))
        else:
            options["max_length"] = config.max_seq_length
        arguments, trainer = _TRAINERS[config.method]
        return trainer(
            model=self.model,
            args=arguments(**options),
            train_dataset=table_of(self.rows),
            processing_class=self.tokenizer,
            callbacks=[self._callback()],
            **more,
        )

    def _total_steps(self) -> int:
        """Return how many optimizer steps the run has, as its Trainer said; 0 before it has begun."""
        return self._status().total_steps or 0
