"""Train with TRL's methods: DPO, ORPO and KTO learn from preferences, GRPO from a reward function.

TRL provides the training loop, the losses and the sampling.
"""

import os
from collections.abc import Sequence
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
from sage.libs.finetune.run.estimate import batch_limit
from sage.libs.finetune.run.rewards import load_reward
from sage.libs.finetune.run.summary import read_status
from sage.libs.finetune.training.changing import UnboundedEpochs
from sage.libs.finetune.training.dataset import TrainingData
from sage.libs.finetune.training.loaded import Install, no_kernels
from sage.libs.finetune.training.trainer import TrainingRun

_TRAINERS = {
    "dpo": (DPOConfig, DPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}


def _unbounded(trainer: type[Trainer]) -> type[Trainer]:
    """Return a subclass of a TRL trainer whose number of steps can be increased during the training."""
    return type(trainer.__name__, (UnboundedEpochs, trainer), {})


def table_of(rows: Sequence[Any]) -> Dataset:
    """Return rows as a dataset for TRL. If messages have different keys, missing keys are not filled with null."""
    return Dataset.from_list(list(rows), on_mixed_types="use_json")


class PreferenceRun(TrainingRun):
    """A run that uses one of TRL's trainers."""

    def _load_data(self) -> TrainingData:
        disable_progress_bars()
        config, rows = self.config, []
        for source in config.sources:
            self.report.progress(f"reading {source.path}")
            report = DatasetReport(source.path)
            samples = list(read_samples(report, parser_of(config.method)))
            report.raise_for_faults()
            self._inspect(samples, report.path)
            rows += [sample.content for sample in samples]
        return TrainingData(rows, len(rows), [], config.batch_size, batch_limit(config))

    def _inspect(self, samples: list[Sample], path: Path) -> None:
        encoder = self.base.encoder(self.config.max_seq_length, self.config.train_on)
        for sample in as_chats(samples):
            encoder.encode_whole([sample])
        encoder.raise_for_faults()
        self.report.findings(encoder.findings, path)

    def _installer(self) -> Install:
        return no_kernels(f"the method {self.config.method} uses TRL's training step")

    def _trainer(self) -> Trainer:
        config = self.config
        options: dict[str, Any] = {
            **self._arguments(),
            "bf16": self.loaded.precision.bf16,
            "gradient_checkpointing": config.gradient_checkpointing == "on"
            or read_status(self.run).activation_checkpointing,
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
        return _unbounded(trainer)(
            model=self.loaded.model,
            args=arguments(**options),
            train_dataset=table_of(self.data.packs),
            processing_class=self.base.tokenizer,
            callbacks=self._callbacks(),
            **more,
        )

    def _planned_steps(self) -> int:
        return read_status(self.run).total_steps or 0
