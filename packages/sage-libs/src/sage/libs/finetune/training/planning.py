"""Second phase of a run: choose the precision and estimate the memory, before the data is read."""

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
    """The precision of a run, the memory that it needs, and the available memory."""

    precision: Precision
    needs: Estimate  #: memory needed in this precision
    held_bytes: int  #: memory that this process uses before data and model are loaded
    available_bytes: int
    smaller: tuple[Precision, Estimate] | None  #: another allowed precision that needs less memory, if there is one

    def fitted(self, most_tokens: int) -> "MemoryPlan":
        """Return a plan with the precision `smaller` if it is set and the run does not fit into memory; else this plan.

        most_tokens: number of tokens in the largest micro-batch.
        """
        if self.smaller and self.needs.total_bytes(most_tokens) > self.available_bytes:
            precision, needs = self.smaller
            return replace(self, precision=precision, needs=needs, smaller=None)
        return self


def plan_memory(base: Path, config: FinetuneConfig, precision: Precision, processes: int) -> MemoryPlan:
    """Return the memory plan of a run; raises RunError if the weights alone do not fit into the available memory.

    processes: number of processes that share the main memory.
    """
    if torch.cuda.is_available():
        held, available = 0, torch.cuda.mem_get_info()[0]
    else:
        held, available = psutil.Process().memory_info().rss, available_bytes() // processes

    def estimate_for(precision: Precision) -> Estimate:
        bf16, base_bits, int8 = precision.bf16, precision.base_bits, precision.int8_products
        return estimate(base, config, bf16=bf16, base_bits=base_bits, int8=int8)

    needs, shrunk = estimate_for(precision), precision.shrunk()
    smaller = (shrunk, estimate_for(shrunk)) if precision.may_shrink else None
    check_memory(smaller[1] if smaller else needs, available, config)
    return MemoryPlan(precision, needs, held, available, smaller)
