"""Measure the available memory, and limit the memory of this process."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from sage.common.cgroups import memory_limits
from sage.libs.finetune.run.estimate import CUDA_BYTES
from sage.libs.finetune.run.reservation import TOLERANCE, reserved_bytes

#: Bytes of a memory limit that are reserved for file pages and kernel memory.
_MARGIN_BYTES = 32 * 2**20
_STATUS = Path("/proc/self/status")


def trim_heap() -> None:
    """Return free heap pages to the operating system. Without glibc, do nothing."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only in glibc
        trim(0)


def available_bytes() -> int:
    """Return how many bytes this process can still allocate. Swap is included, and container limits are respected."""
    return min([psutil.virtual_memory().available + psutil.swap_memory().free, *_available_in_cgroups()])


def used_bytes() -> int:
    """Return the bytes of memory that this process uses now: GPU memory if there is a GPU, else main memory."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Return the largest number of bytes that this process has used since it started, measured like `used_bytes`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if _STATUS.exists():  # on Linux, `ru_maxrss` can be the peak of the parent process
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
        if peak := fields.get("VmHWM"):
            return int(peak.split()[0]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def limit_gpu_memory() -> None:
    """Limit the GPU memory of this process to the run's reservation, so that an allocation beyond the limit fails."""
    if (reserved := reserved_bytes()) and torch.cuda.is_available():
        share = (TOLERANCE * reserved - CUDA_BYTES) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0))


def refuse_beyond_limit() -> None:
    """Limit the memory of this process, so that an allocation beyond the machine's or the container's memory fails.

    A training step can recover from a failed allocation, but not from the kernel's out-of-memory killer. On systems
    other than Linux, this function does nothing.
    """
    if sys.platform != "linux":
        return
    held = psutil.Process().memory_info()
    available = [psutil.virtual_memory().total - held.rss, *_available_in_cgroups()]
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit_bytes = held.data + max(min(available) - _MARGIN_BYTES, 0)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard), hard)
    )


def _available_in_cgroups() -> Iterator[int]:
    for group in memory_limits():
        yield group.limit_bytes - group.used_bytes
