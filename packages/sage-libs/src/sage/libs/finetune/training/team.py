"""Data-parallel training with several processes. On a machine with GPUs, each process uses its own GPU.

The main process is the run's worker. Only the main process holds the lock, handles signals, evaluates, and writes events
and results. The main process starts the other processes, which only compute training steps.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from torch import distributed

from sage.common.counting import counted
from sage.common.errors import ConfigError
from sage.common.training import FailedEvent
from sage.libs.finetune.run.retrying import OUT_OF_MEMORY_EXIT, restart_with_less_memory
from sage.libs.finetune.run.rundir import RANK_VARIABLE, RunDirectory
from sage.libs.finetune.training.stopping import StopRequest

#: Timeout of messages. It is long, because the other processes wait while the main process tokenizes or evaluates.
_PATIENCE = timedelta(days=30)
_LOOK_SECONDS = 0.5


class Team:
    """Communication between the processes of a run. If the run has only one process, no messages are sent."""

    def __init__(self, run: RunDirectory, size: int, stop: StopRequest) -> None:
        """Start the other processes if this is the main process; raises ConfigError if there are too few GPUs."""
        self.rank, self.size = int(os.environ.get(RANK_VARIABLE, "0")), size
        self._checking = threading.Lock()
        self._run, self._stop, self._others, self._control = run, stop, list[subprocess.Popen[bytes]](), None
        if torch.cuda.is_available() and size > torch.cuda.device_count():
            raise ConfigError(
                code="too_few_gpus",
                message=f"num_processes={size}, but this machine has {counted(torch.cuda.device_count(), 'GPU')}.",
                hint="Use at most one process per GPU.",
                param="num_processes",
            )
        if size > 1 and not torch.cuda.is_available():
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        if size > 1 and self.is_main_process:
            self._start_others()
        elif size > 1:
            main_process = os.getppid()
            self._watch(lambda: os._exit(1) if os.getppid() != main_process else None)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Send the main process's value to every process, and return this value. Every process must call this method."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group())
        return values[0]

    def total(self, values: list[int]) -> list[int]:
        """Return for each value the sum over all processes. Every process must call this method."""
        if self.size == 1:
            return values
        sums = torch.tensor(values)
        distributed.all_reduce(sums, group=self._group())
        return [int(value) for value in sums]

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            distributed.barrier(group=self._group())

    def check(self) -> None:
        """Wait 0.5 s, and exit if another process has failed. Only the main process does this."""
        if self._others:
            time.sleep(_LOOK_SECONDS)
            self._check_others()

    def close(self) -> None:
        """Kill the other processes."""
        others, self._others = self._others, []
        for process in others:
            process.kill()
            process.wait()

    def _group(self) -> Any:
        """Return the process group for messages, and create it on first use. Gradients are exchanged in another group."""
        if self._control is None:
            PartialState(cpu=not torch.cuda.is_available())
            self._control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return self._control

    def _start_others(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(self.size)}
        os.environ.update(meeting, RANK="0", LOCAL_RANK="0")
        for rank in map(str, range(1, self.size)):
            argv = [sys.executable, "-m", "sage.libs.finetune.worker", str(self._run.path)]
            mine = {RANK_VARIABLE: rank, "RANK": rank, "LOCAL_RANK": rank}
            self._others.append(subprocess.Popen(argv, env={**os.environ, **mine}))
        self._watch(self._check_others)

    def _check_others(self) -> None:
        """Exit if another process has failed, because the next training step would wait for that process forever."""
        with self._checking:  # two threads call this method, and a failure must be reported only once
            for process in self._others:
                if (code := process.poll()) and self._others:  # `close` empties the list before killing the processes
                    self._others_failed(code)

    def _others_failed(self, code: int) -> NoReturn:
        self.close()
        if code == OUT_OF_MEMORY_EXIT:
            restart_with_less_memory(self._run, lambda: self._stop.requested)
            message = f"Out of memory: one of the run's {self.size} processes could not allocate memory."
            hint = "Start a new run with a smaller --batch-size or --max-seq-length."
            self._run.append_event(FailedEvent(code="out_of_memory", message=message, hint=hint))
        elif code < 0:  # killed by a signal, so the process could not report the error itself
            message = f"One of the run's {self.size} processes was killed ({signal.Signals(-code).name})."
            self._run.append_event(FailedEvent(code="worker_died", message=message, hint="`resume` continues the run."))
        os._exit(1)

    @staticmethod
    def _watch(look: Callable[[], object]) -> None:
        def watch() -> None:
            while True:
                look()
                time.sleep(_LOOK_SECONDS)

        threading.Thread(target=watch, daemon=True).start()
