"""Write files atomically, so that each file is complete even after a crash or power failure."""

import os
import threading
from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file atomically, so that readers see either the old or the new content.

    mode: permissions of the file, before the umask is applied.
    """
    # The temporary file's name contains the thread's id, because several threads can replace one file at the same time.
    aside = path.with_name(f".{path.name}.partial-{threading.get_native_id()}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def fsync_tree(folder: Path) -> None:
    """Call fsync for a folder and for all files and folders below it."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Call fsync for a file or a folder. For a folder, this syncs the list of its entries, but not their content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
