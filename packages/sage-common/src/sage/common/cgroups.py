"""Read the CPU and memory limits of this process on Linux, from its CPU affinity and its control groups (cgroups).

Versions 1 and 2 of control groups are supported. The limit of a group also applies to the groups inside this group, so the
smallest limit counts.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
#: The groups of this process, one per line: `NUMBER:CONTROLLERS:PATH`. In version 2, CONTROLLERS is empty.
_OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """The memory limit of a control group, and the memory that the processes of the group use."""

    limit_bytes: int
    used_bytes: int  #: without file pages, because the kernel can drop them


def memory_limits() -> list[MemoryLimit]:
    """Return the memory limits of the groups that contain this process, innermost group first."""
    limits = []
    for group in own_groups("memory"):
        for limit_name, used_name in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
            with contextlib.suppress(OSError):
                limit = _read(group / limit_name)
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                if limit != "max":  # in version 1, the limit of an unlimited group is a huge number
                    limits.append(MemoryLimit(int(limit), int(stat[used_name])))
    return limits


def available_cores() -> int:
    """Return the number of physical CPU cores that this process may use, within the CPU limits of its groups."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    if affinity is None:
        return psutil.cpu_count(logical=False) or 1
    cores = len({_core(cpu) for cpu in affinity(0)})
    return max(1, min([cores, *map(int, _core_limits())]))


def own_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, such as `memory`. The innermost group is first."""
    if not _ROOT.is_dir():
        return
    for line in _read(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root) and folder.is_dir())


def _core(cpu: int) -> str:
    """Return a text that is the same for all logical CPUs of one physical core."""
    try:
        return _read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list")
    except OSError:
        return str(cpu)


def _core_limits() -> Iterator[float]:
    for group in own_groups("cpu"):
        with contextlib.suppress(OSError):
            quota, period = _read(group / "cpu.max").split()
            if quota != "max":
                yield int(quota) / int(period)
        with contextlib.suppress(OSError):
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
            if int(quota) > 0:  # -1: no limit
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
