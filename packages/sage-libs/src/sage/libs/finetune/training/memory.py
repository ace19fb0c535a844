"""Measure the available memory, and limit the memory of this process."""

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

#: Bytes of a memory limit that are reserved for file pages and kernel memory.
_MARGIN_BYTES = 32 * 2**20
_CGROUPS = Path("/sys/fs/cgroup")


def trim_heap() -> None:
    """Return free heap pages to the operating system, so that fragmentation does not make the heap grow."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only in glibc
        trim(0)


def available_bytes() -> int:
    """Return the bytes that this process can still allocate on the machine (with swap) and within its container limits."""
    return min([psutil.virtual_memory().available + psutil.swap_memory().free, *_available(_own_cgroups())])


def refuse_beyond_limit() -> None:
    """Limit this process to the free memory of the container or machine, so that an allocation beyond the limit fails.

    A training step can recover from a failed allocation, but not from the kernel's out-of-memory killer. Linux only.
    """
    if not _CGROUPS.is_dir():
        return
    held = psutil.Process().memory_info()
    available = [psutil.virtual_memory().total - held.rss, *_available(_own_cgroups())]
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit_bytes = held.data + max(min(available) - _MARGIN_BYTES, 0)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard), hard)
    )


def _own_cgroups() -> Iterator[Path]:
    """Yield the folders of this process's memory control groups, innermost first; yield none if the system is not Linux."""
    if not _CGROUPS.is_dir():
        return
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # the field is empty in version 2 of control groups
            continue
        root = _CGROUPS / controllers
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root) and folder.is_dir())


def _available(groups: Iterator[Path]) -> Iterator[int]:
    """Yield the free bytes of each group with a limit. File pages count as free, because the kernel can drop them.

    If a group has no limit, the file contains `max` in version 2 of control groups, and a huge number in version 1.
    """
    for group in groups:
        for limit_name, used_name in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
            try:
                limit = (group / limit_name).read_text(encoding="ascii").strip()
                stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            except OSError:
                continue
            if limit != "max":
                yield int(limit) - int(stat[used_name])
