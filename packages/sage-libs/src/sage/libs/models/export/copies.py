"""Copies of models in the formats of inference servers. The total size of all copies is limited.

A copy is the folder `ROOT/KEY`. ROOT is `gguf`, `openvino` or `vllm` in `cache_dir`. A process that uses a copy holds a
shared lock on `ROOT/.KEY.use` until the process exits, even after `exec`. The modification time of `ROOT/.KEY.use` is the
time of the last use.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sage.common.paths import get_user_paths, private_file, private_folder
from sage.common.processes import held_lock
from sage.common.settings import load_settings
from sage.libs.models.export.folder import new_folder

_KINDS = ("gguf", "openvino", "vllm")


def usable_copy(kind: str, key: str, needed_bytes: float, write: Callable[[Path], None]) -> Path:
    """Return the folder of a copy, and create the copy if needed. The copy is not deleted before this process exits.

    kind: one of `_KINDS`.
    write: function that writes the files into a new folder. If the function raises an exception, the folder is removed.
    If all copies together are larger than `model_cache_gb`, unused copies are deleted, the least recently used first.
    Raises SageError.
    """
    target = private_folder(_root(kind)) / key
    descriptor = os.open(private_file(_use(target)), os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.set_inheritable(descriptor, True)  # the server that replaces this process (`exec`) keeps the lock
    os.utime(descriptor)
    with held_lock(target.with_name(f".{key}.lock")):
        _delete_partial(target)
        if not target.is_dir():
            with new_folder(target, needed_bytes) as folder:
                write(folder)
    prune(int(load_settings().model_cache_gb * 1e9))
    return target


def prune(limit_bytes: int) -> None:
    """Delete unused copies until all copies together have at most `limit_bytes`; delete incomplete copies too."""
    uses = [use for kind in _KINDS for use in _root(kind).glob(".*.use")]
    total_bytes = copies_bytes()
    for use in sorted(uses, key=lambda use: use.stat().st_mtime_ns):
        with _unused(use) as is_unused:
            if is_unused:
                target = use.with_name(use.name.removeprefix(".").removesuffix(".use"))
                _delete_partial(target)
                if total_bytes > limit_bytes and target.is_dir():
                    total_bytes -= _size_bytes(target)
                    shutil.rmtree(target, ignore_errors=True)


def copies_bytes() -> int:
    """Return the size of all copies on the disk in bytes; symbolic links are not counted."""
    return sum(_size_bytes(_root(kind)) for kind in _KINDS)


@contextlib.contextmanager
def _unused(use: Path) -> Iterator[bool]:
    """Yield whether a copy is unused. If the copy is unused, no process can begin to use it during the `with` block."""
    with use.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _delete_partial(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.partial-*"):  # files of a killed process
        shutil.rmtree(left, ignore_errors=True)


def _root(kind: str) -> Path:
    return get_user_paths().cache_dir / kind


def _use(target: Path) -> Path:
    return target.with_name(f".{target.name}.use")


def _size_bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
