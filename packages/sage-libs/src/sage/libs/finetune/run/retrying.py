"""Restart a worker with smaller micro-batches after an out-of-memory error.

Only runs that use TRL and runs with several processes are restarted. Other runs compute a micro-batch in parts instead.
"""

import os
import signal
import sys
from collections.abc import Callable

from sage.common.training import LaunchedEvent, WarningEvent
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunStatus
from sage.libs.finetune.run.summary import read_status

#: Exit code of a process that ran out of memory and is not the main process of a run.
OUT_OF_MEMORY_EXIT = 12
#: Minimum number of samples in a micro-batch, for methods whose minimum is not 1. KTO compares samples with each other, so
#: a micro-batch needs two samples.
_LEAST_SAMPLES = {"kto": 2}


def restarts_when_out_of_memory(config: FinetuneConfig) -> bool:
    """Return whether an out-of-memory error restarts the worker."""
    return config.method != "sft" or config.num_processes > 1


def micro_batch_size(config: FinetuneConfig, halvings: int) -> int:
    """Return the number of samples per forward pass after `halvings` reductions.

    Each reduction replaces the number by its largest proper divisor. A divisor below the method's minimum is not used.
    """
    size = 1 if config.pack_tokens else config.batch_size
    for _ in range(halvings):
        smaller = range(size // 2, _LEAST_SAMPLES.get(config.method, 1) - 1, -1)
        size = next((samples for samples in smaller if size % samples == 0), size)
    return size


def next_saving(config: FinetuneConfig, status: RunStatus) -> WarningEvent | None:
    """Return how the run saves memory after the next out-of-memory error, or None if no more memory can be saved."""
    before, after = (micro_batch_size(config, halvings) for halvings in (status.halvings, status.halvings + 1))
    if after < before:
        steps = config.gradient_accumulation_steps * config.batch_size // after
        message = (
            f"Out of memory: the micro-batch size is now {after} instead of {before}, and a step has {steps} micro-batches."
        )
        return WarningEvent(message=message, halvings=status.halvings + 1)
    if config.gradient_checkpointing == "auto" and not status.activation_checkpointing:
        message = "Out of memory: enabling gradient checkpointing, which is slower."
        return WarningEvent(message=message, activation_checkpointing=True)
    return None


def restart_with_less_memory(run: RunDirectory, is_stop_requested: Callable[[], bool]) -> None:
    """Replace this process by a new worker that saves memory.

    The new worker keeps the process id and the run's lock, and continues from the last checkpoint. The function returns only
    if the run cannot save more memory, or if a stop was requested.
    """
    config = run.read_spec().config
    saving = next_saving(config, read_status(run)) if restarts_when_out_of_memory(config) else None
    if saving is None:
        return
    # SIGTERM stays blocked until the new worker has installed its signal handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if is_stop_requested():
        return
    run.append_event(saving)
    run.append_event(LaunchedEvent())
    os.execv(sys.executable, [sys.executable, "-m", "sage.libs.finetune.worker", str(run.path)])
