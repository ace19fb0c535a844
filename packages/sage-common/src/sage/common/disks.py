"""Find the free space of disks, and recognize full disks."""

import errno
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest of its parent folders that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def free_bytes(path: Path) -> int:
    """Return the free space of the disk on which a file or folder is, or would be created."""
    return shutil.disk_usage(nearest_existing(path)).free


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk is full."""
    return error.errno in _FULL
