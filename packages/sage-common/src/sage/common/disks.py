"""Find the free space of disks, and recognize full disks."""

import errno
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def nearest_existing(path: Path) -> Path:
    """Return the path if it exists, or else the nearest parent folder that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def free_bytes(path: Path) -> int:
    """Return the number of free bytes on the disk of a file or folder, which need not exist."""
    return shutil.disk_usage(nearest_existing(path)).free


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk is full."""
    return error.errno in _FULL
