"""Check the free disk space, and report a full disk."""

from pathlib import Path

from sage.common.disks import free_bytes, nearest_existing
from sage.common.errors import BackupError

_HINT = "Free up disk space, or choose a folder on another disk."


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise BackupError if the disk of a folder has too little free space; the folder need not exist yet."""
    if (free := free_bytes(folder)) < needed_bytes:
        need = f"{needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        message = f"The disk of {nearest_existing(folder)} has too little free space: {need}."
        raise BackupError(code="disk_full", message=message, hint=_HINT)


def full_disk(folder: Path) -> BackupError:
    """Return the error for a disk that became full while files were written."""
    return BackupError(
        code="disk_full", message=f"The disk of {folder} is full. The incomplete files were removed.", hint=_HINT
    )
