"""Check the free disk space, and report a full disk."""

import errno
import shutil
from pathlib import Path

from sage.common.errors import BackupError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HINT = "Free up disk space, or choose a folder on another disk."


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise BackupError if the disk of a folder has too little free space; the folder need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        need = f"{needed_bytes / 1e9:.2f} GB are needed, {free_bytes / 1e9:.2f} GB are free"
        raise BackupError(code="disk_full", message=f"The disk of {existing} has too little free space: {need}.", hint=_HINT)


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk is full."""
    return error.errno in _FULL


def full_disk(folder: Path) -> BackupError:
    """Return the error for a disk that became full while files were written."""
    return BackupError(
        code="disk_full", message=f"The disk of {folder} is full. The incomplete files were removed.", hint=_HINT
    )
