"""Measure the peak memory of process trees: GPU memory if they use a GPU, else main memory."""

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from sage.llm.control_plane.inventory.gpus import gpu_memory_of

_SAMPLE_SECONDS = 0.2


def pss_bytes(pid: int) -> int:
    """Return the memory (PSS) of a process and its descendants, in bytes. Shared pages are counted once."""
    total = 0
    with contextlib.suppress(psutil.Error, OSError):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


class PeakMemory:
    """Measures the maximum of the total memory of several process trees during a `with` block."""

    def __init__(self, pids: set[int]) -> None:
        self.peak_bytes = 0
        self._pids, self._done = pids, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        """Start sampling the memory."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop sampling the memory."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(gpu_memory_of(pid) or pss_bytes(pid) for pid in self._pids))
            self._done.wait(_SAMPLE_SECONDS)
