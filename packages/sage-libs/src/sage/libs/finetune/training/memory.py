"""What to do where memory does not suffice."""

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

#: How allocators say it: CUDA's, torch's on the CPU, C++'s, oneDNN's.
_WORDS = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive", "could not create a memory")
#: Of a limit, so much is left to what is not allocated by us: file pages, the kernel's own.
_MARGIN_BYTES = 32 * 2**20
_CGROUPS = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory was asked for that is not there."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)


def give_back() -> None:
    """Give the system the pages that nothing is left of; else the heap keeps them, and grows by what lies in between."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def free_bytes() -> int:
    """Return the main memory that this process can still have, of the container and of the machine with its swap."""
    return min([psutil.virtual_memory().available + psutil.swap_memory().free, *_rooms(_own_cgroups())])


def refuse_beyond_limit() -> None:
    """From now on have memory refused that the container or the machine does not have, where it would kill the process.

    What is refused is an error, and a training step can do with less; a killed process cannot. Linux only.
    """
    if not _CGROUPS.is_dir():
        return
    held = psutil.Process().memory_info()
    rooms = [psutil.virtual_memory().total - held.rss, *_rooms(_own_cgroups())]
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit_bytes = held.data + max(min(rooms) - _MARGIN_BYTES, 0)
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard), hard)
    )


def _own_cgroups() -> Iterator[Path]:
    """Yield the folders of the memory control groups that this process is in, innermost first; none without Linux."""
    if not _CGROUPS.is_dir():
        return
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # version 2 names none
            continue
        root = _CGROUPS / controllers
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root) and folder.is_dir())


def _rooms(groups: Iterator[Path]) -> Iterator[int]:
    """Yield what each group's limit leaves, in bytes; pages of files are not counted, they give way.

    A group without a limit says `max` in version 2 of control groups, and a number beyond any machine in version 1.
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
