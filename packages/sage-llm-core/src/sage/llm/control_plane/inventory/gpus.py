"""Read the NVIDIA GPUs of this machine with NVIDIA's management library (NVML)."""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sage.common.fake_devices import parse_fake_devices
from sage.common.identity import all_sessions


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a part of a GPU that was partitioned with MIG (multi-instance GPU)."""

    index: int
    name: str
    memory_total_bytes: int
    memory_used_bytes: int = 0
    uuid: str | None = None
    number: int | None = None  #: NVML's index of the GPU, or of the GPU that contains the MIG device; None: a fake GPU
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    is_mig: bool = False
    is_fake: bool = False
    process_bytes: Mapping[int, int] = field(default_factory=dict)  #: keys: process ids; values: GPU memory of the process

    @property
    def selector(self) -> str | None:
        """The value that selects the GPU in `CUDA_VISIBLE_DEVICES`; None for a fake GPU.

        Whole GPUs are selected by number, because not every version of vLLM accepts UUIDs.
        """
        return self.uuid if self.is_mig or self.number is None else str(self.number)

    def bytes_of(self, pids: Collection[int]) -> int:
        """Return the memory that processes use on this GPU."""
        return sum(self.process_bytes.get(pid, 0) for pid in pids)


def list_gpus() -> list[Gpu]:
    """Return the GPUs of this machine that CUDA_VISIBLE_DEVICES of this process does not exclude.

    A GPU that does not report its memory is omitted. The other GPUs keep their indexes.
    """
    nvml = _nvml()
    return [gpu for gpu in _gpus(nvml) if _is_visible(gpu)] if nvml else []


def fake_gpus(text: str) -> list[Gpu]:
    """Return the GPUs that the setting `fake_devices` describes."""
    devices = parse_fake_devices(text)
    return [Gpu(index, device.name, device.memory_bytes, is_fake=True) for index, device in enumerate(devices)]


def has_gpu() -> bool:
    """Return whether this machine has a GPU. Fake GPUs do not count."""
    return bool(list_gpus())


def gpu_memory_of(pid: int) -> int | None:
    """Return the GPU memory of the session that the process `pid` leads, or None if the session uses no GPU memory.

    The memory is the total of all processes in the session, on all GPUs.
    """
    gpus = list_gpus()
    members = all_sessions().get(pid, [pid]) if gpus else []  # all processes are read only if there is a GPU
    return sum(gpu.bytes_of(members) for gpu in gpus) or None


def _gpus(nvml: Any) -> Iterator[Gpu]:
    index = 0
    for number in range(_supported(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _supported(nvml, nvml.nvmlDeviceGetHandleByIndex, number)
        parts = _parts(nvml, handle)
        for part in [handle] if parts is None else parts:
            if part is not None and (gpu := _gpu(nvml, index, part, handle, is_mig=parts is not None)):
                yield replace(gpu, number=number)
            index += 1


def _is_visible(gpu: Gpu) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES allows this process to use a GPU.

    If the variable is not set, all GPUs are allowed. Otherwise, a GPU is allowed if an entry of the variable is the GPU's
    number or the beginning of the GPU's UUID.
    """
    entries = os.environ.get("CUDA_VISIBLE_DEVICES", str(gpu.number)).split(",")
    return any(
        entry and (entry == str(gpu.number) or (gpu.uuid or "").startswith(entry)) for entry in map(str.strip, entries)
    )


def _parts(nvml: Any, handle: Any | None) -> list[Any] | None:
    mode = None if handle is None else _supported(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    places = range(_supported(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    found = (_supported(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place) for place in places)
    return [part for part in found if part is not None]


def _gpu(nvml: Any, index: int, handle: Any, parent: Any, *, is_mig: bool) -> Gpu | None:
    memory = _supported(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None:
        return None
    rates = _supported(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    processes = _supported(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return Gpu(
        index,
        _supported(nvml, nvml.nvmlDeviceGetName, handle) or "GPU",
        memory.total,
        memory.used,
        uuid=_supported(nvml, nvml.nvmlDeviceGetUUID, handle),
        utilization_percent=rates and rates.gpu,
        temperature_celsius=_supported(nvml, nvml.nvmlDeviceGetTemperature, parent, nvml.NVML_TEMPERATURE_GPU),
        is_mig=is_mig,
        process_bytes={process.pid: process.usedGpuMemory or 0 for process in processes},
    )


def _supported(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any | None:
    """Return the result of a call, or None if NVML reports an error, such as a lost GPU or an unsupported call."""
    with contextlib.suppress(nvml.NVMLError):
        return call(*arguments)
    return None


@functools.cache
def _nvml() -> Any | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
