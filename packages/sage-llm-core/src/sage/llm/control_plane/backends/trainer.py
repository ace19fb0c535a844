"""The backend for SAGE's own trainer. Each training run has its own worker process."""

import sys
from dataclasses import replace
from typing import ClassVar

from pydantic import BaseModel

from sage.common.paths import get_user_paths
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import CUDA_BYTES, FRAMEWORK_BYTES, TrainingMemory, expected_kernels
from sage.libs.finetune.run.history import default_formats, earlier_run, smallest_formats
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import Capabilities
from sage.llm.control_plane.backends.memory import MemoryEstimate, sizes_of


class TrainerBackend:
    """Trains adapters, or whole models."""

    name: ClassVar[str] = "trainer"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.FINETUNE}), frozenset(ModelKind))
    options: ClassVar[type[BaseModel]] = FinetuneConfig
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def estimate(self, model: ModelSource, options: FinetuneConfig) -> MemoryEstimate | None:
        """Return the memory of a run with its largest micro-batch.

        `least_bytes` is the memory of a run with a micro-batch of one sample, which has `max_seq_length` tokens, and
        with the smallest number formats that the options allow.
        The number formats are those of an earlier run with the same model and options. If there is no such run, the largest
        number formats that the run can have are assumed.
        """
        needs = training_memory(model, options)
        if needs is None:
            return None
        breakdown = needs.largest()
        smallest = smallest_formats(options, needs.formats, environments.device())
        needs = replace(needs, formats=smallest, has_kernels=expected_kernels(options, smallest))
        return MemoryEstimate(breakdown, min(breakdown.total_bytes, needs.least(options.max_seq_length).total_bytes))

    def memory_bytes(self, model: ModelSource, options: FinetuneConfig) -> int | None:
        """Return the total of `estimate`, or None if `estimate` returns None."""
        estimate = self.estimate(model, options)
        return None if estimate is None else estimate.total_bytes


def training_memory(model: ModelSource, config: FinetuneConfig) -> TrainingMemory | None:
    """Return the memory of a run as a function of its micro-batch, or None if the model is not on this machine."""
    sizes = sizes_of(model.base or model)
    if sizes is None:
        return None
    device = environments.device()
    earlier = earlier_run(get_user_paths().finetuned_dir, config)
    formats = earlier.formats if earlier else default_formats(config, device)
    checkpointing = config.gradient_checkpointing == "on"
    framework_bytes, processes = (CUDA_BYTES, 1) if device == "cuda" else (FRAMEWORK_BYTES, config.num_processes)
    return TrainingMemory(
        sizes, config, formats, expected_kernels(config, formats), framework_bytes, checkpointing, processes
    )
