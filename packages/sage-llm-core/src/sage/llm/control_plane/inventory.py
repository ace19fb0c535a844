"""Find the devices of this node: GPUs and main memory."""

import contextlib
import functools
import socket
from collections.abc import Iterator
from typing import Any

import psutil

from sage.llm.client.types import Device


def list_devices() -> list[Device]:
    """Return this node's devices, GPUs first, main memory last."""
    memory, node = psutil.virtual_memory(), socket.gethostname()
    main = Device(
        node=node,
        kind="cpu",
        index=0,
        name="main memory",
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.total - memory.available,
        utilization_percent=psutil.cpu_percent(),
    )
    return [*_gpus(node), main]


def gpu_memory_of(pid: int) -> int | None:
    """Return the memory that a process and its children use on all GPUs; None if they use none."""
    nvml = _nvml()
    if nvml is None:
        return None
    used, pids = 0, {pid}
    with contextlib.suppress(psutil.Error):
        pids.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    for _, handle in _handles(nvml):
        with contextlib.suppress(nvml.NVMLError):
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                used += process.usedGpuMemory or 0 if process.pid in pids else 0
    return used or None


def _gpus(node: str) -> Iterator[Device]:
    nvml = _nvml()
    if nvml is None:
        return
    for index, handle in _handles(nvml):
        utilization = None
        with contextlib.suppress(nvml.NVMLError):  # a MIG or virtual GPU does not report its utilization
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        with contextlib.suppress(nvml.NVMLError):  # omit a GPU that does not report its memory
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            yield Device(
                node=node,
                kind="cuda",
                index=index,
                name=nvml.nvmlDeviceGetName(handle),
                memory_total_bytes=memory.total,
                memory_used_bytes=memory.used,
                utilization_percent=utilization,
            )


def _handles(nvml: Any) -> Iterator[tuple[int, Any]]:
    """Yield the index and the handle of each GPU that answers."""
    count = 0
    with contextlib.suppress(nvml.NVMLError):
        count = nvml.nvmlDeviceGetCount()
    for index in range(count):
        with contextlib.suppress(nvml.NVMLError):
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)


@functools.cache
def _nvml() -> Any | None:
    """Return NVIDIA's management library (NVML) after its initialization; None on a machine without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
