"""Estimate the memory of a run, and choose the precision so that the run fits into memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from sage.common.errors import ModelError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import (
    CUDA_BYTES,
    FRAMEWORK_BYTES,
    Formats,
    TrainingEstimate,
    TrainingMemory,
    check_memory,
    expected_kernels,
    gigabytes,
)
from sage.libs.finetune.run.reservation import reserved_bytes
from sage.libs.finetune.training.memory import available_bytes
from sage.libs.finetune.training.precision import Precision
from sage.libs.models.architecture import read_architecture

#: Main memory that libraries allocate between the planning and the end of the first step. Measured with torch 2.9 on Linux.
LATER_BYTES = 60_000_000

#: If a run needs more than this share of the available memory, its largest micro-batch is tried before the first step.
_SCARCE_SHARE = 0.5


@dataclass(frozen=True)
class Reduction:
    """The changes that make a run fit into its reservation: smaller micro-batches, and possibly gradient checkpointing."""

    halvings: int  #: how many times each micro-batch is cut in half
    checkpointing: bool  #: whether gradient checkpointing is used
    estimate: TrainingEstimate  #: the memory that the run needs after the reduction

    @property
    def message(self) -> str:
        """The reduction as text for users."""
        parts = f"micro-batches are computed in up to {2**self.halvings} parts"
        checkpointing = ", with gradient checkpointing" if self.checkpointing else ""
        return (
            f"The run needs more memory than is reserved for it, so {parts}{checkpointing}. "
            "The optimizer steps do not change. A larger --memory-gb makes the run faster."
        )


@dataclass(frozen=True)
class MemoryPlan:
    """The precision of a run, the memory that the run needs, and the available memory."""

    precision: Precision
    needs: TrainingMemory  #: memory that the run needs with `precision`
    #: On a GPU: free memory. On a CPU: the memory that this process uses, plus this process's share of the free memory.
    available_bytes: int
    smaller: Precision | None  #: another allowed precision, with which the run needs less memory
    allowed_bytes: float = math.inf  #: memory that the reservation allows the run to use

    def fitted(self, largest_batch: Mapping[int, int]) -> "MemoryPlan":
        """Return this plan if the run fits into memory or `smaller` is None. Otherwise, return a plan that uses `smaller`.

        largest_batch: the largest micro-batch, as a mapping from a length in tokens to the number of samples of this length.
        """
        if self.smaller and self.estimate(largest_batch).total_bytes > min(self.available_bytes, self.allowed_bytes):
            needs = replace(self.needs, formats=formats_of(self.smaller))
            return replace(self, precision=self.smaller, needs=needs, smaller=None)
        return self

    def loaded_as(self, precision: Precision, *, has_kernels: bool) -> "MemoryPlan":
        """Return the plan for a model loaded with `precision`.  has_kernels: whether SAGE's training step is used."""
        return replace(self, needs=replace(self.needs, formats=formats_of(precision), has_kernels=has_kernels))

    def estimate(self, largest_batch: Mapping[int, int]) -> TrainingEstimate:
        """Return the memory that the run needs."""
        return self.needs.at(largest_batch or {0: 1})

    def is_scarce(self, largest_batch: Mapping[int, int]) -> bool:
        """Return whether the run needs more than half of the available memory."""
        return self.estimate(largest_batch).total_bytes > _SCARCE_SHARE * self.available_bytes

    def reduction(self, largest_batch: Mapping[int, int]) -> Reduction | None:
        """Return how to make the run fit into its reservation; None if the run fits or `largest_batch` is empty."""
        if not largest_batch or self.estimate(largest_batch).total_bytes <= self.allowed_bytes:
            return None
        longest, samples = max(largest_batch), sum(largest_batch.values())
        tokens = sum(length * count for length, count in largest_batch.items())
        fitting = self.needs.fitting_samples(int(self.allowed_bytes), longest)
        parts = min(samples, tokens / (fitting * longest)) if fitting else samples
        checkpointing = self.needs.checkpointing or (not fitting and self.needs.config.gradient_checkpointing == "auto")
        estimate = replace(self.needs, checkpointing=checkpointing).at({longest: max(1, fitting)})
        return Reduction(max(0, math.ceil(math.log2(parts))), checkpointing, estimate)

    def describe(self, largest_batch: Mapping[int, int]) -> str:
        """Return a message about the needed and the available memory. If the run does not fit, add how many tokens fit."""
        needed_bytes = self.estimate(largest_batch).total_bytes
        text = f"the run needs about {gigabytes(needed_bytes)} of memory; {gigabytes(self.available_bytes)} are available"
        if needed_bytes <= self.available_bytes:
            return text
        longest = max(largest_batch)
        tokens = sum(length * count for length, count in largest_batch.items())
        samples = self.needs.fitting_samples(self.available_bytes, longest)
        return (
            f"{text}, enough for about {samples * longest:,} tokens at once; micro-batches of up to "
            f"{tokens:,} tokens are computed in parts if they do not fit"
        )


def plan_memory(base: Path, config: FinetuneConfig, precision: Precision, processes: int) -> MemoryPlan:
    """Return the memory plan of a run.

    Raises RunError if the run would need more than the available memory even with an empty micro-batch.
    processes: number of processes that share the main memory.
    """
    sizes = read_architecture(base)
    if sizes is None:
        raise ModelError(code="model_invalid", message=f"{base} has no weights.", param="model")
    if torch.cuda.is_available():
        framework, available = 0, torch.cuda.mem_get_info()[0]
        reserved_framework, sharers = CUDA_BYTES, 1
    else:
        reserved_framework, sharers = FRAMEWORK_BYTES, processes
        held = psutil.Process().memory_info().rss
        framework, available = held + LATER_BYTES, held + available_bytes() // processes
    formats = formats_of(precision)
    checkpointing = config.gradient_checkpointing == "on"
    needs = TrainingMemory(sizes, config, formats, expected_kernels(config, formats), framework, checkpointing)
    smaller = precision.shrunk() if precision.may_shrink else None
    check_memory(replace(needs, formats=formats_of(smaller)) if smaller else needs, 0, available)
    reserved = reserved_bytes()
    allowed = math.inf if reserved is None else framework + reserved // sharers - reserved_framework
    return MemoryPlan(precision, needs, available, smaller, allowed)


def formats_of(precision: Precision) -> Formats:
    """Return the number formats of a precision."""
    return Formats(precision.bf16, precision.bf16_products, precision.base_bits, precision.int8_products)
