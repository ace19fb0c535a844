"""The second phase: precision and memory, decided before the data is read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import Estimate, check_memory, estimate
from sage.libs.finetune.training.memory import available_bytes
from sage.libs.finetune.training.precision import Precision


@dataclass(frozen=True)
class MemoryPlan:
    """The precision of a run, what it needs, and what there is."""

    precision: Precision
    held_bytes: int  #: by this process already, before data and model
    available_bytes: int
    estimate_for: Callable[[Precision], Estimate]

    @property
    def needs(self) -> Estimate:
        """The memory that the run needs in its precision."""
        return self.estimate_for(self.precision)

    def fitted(self, most_tokens: int) -> "MemoryPlan":
        """Return a plan with smaller number formats if the run would otherwise not fit, and may use them.

        most_tokens: in the largest micro-batch.
        """
        if self.precision.may_shrink and self.needs.total_bytes(most_tokens) > self.available_bytes:
            return replace(self, precision=self.precision.shrunk())
        return self


def plan_memory(base: Path, config: FinetuneConfig, precision: Precision, processes: int) -> MemoryPlan:
    """Return the plan; raises RunError if even the weights cannot fit."""
    if torch.cuda.is_available():
        held, available = 0, torch.cuda.mem_get_info()[0]
    else:
        held, available = psutil.Process().memory_info().rss, available_bytes() // processes

    def estimate_for(precision: Precision) -> Estimate:
        bf16, base_bits, int8 = precision.bf16, precision.base_bits, precision.int8_products
        return estimate(base, config, bf16=bf16, base_bits=base_bits, int8=int8)

    check_memory(estimate_for(precision.shrunk() if precision.may_shrink else precision), available, config)
    return MemoryPlan(precision, held, available, estimate_for)
