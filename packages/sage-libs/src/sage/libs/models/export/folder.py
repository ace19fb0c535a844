"""Create an output folder atomically, so that no incomplete folder is left."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sage.common.errors import OutputError
from sage.common.files import fsync_path, fsync_tree
from sage.libs.models.resolve import ModelSource, safetensors_header

_RESERVE_BYTES = 200_000_000


@contextlib.contextmanager
def new_folder(target: Path, needed_bytes: float) -> Iterator[Path]:
    """Yield a new folder beside `target`. At the end, rename the folder to `target`. After an exception, remove the folder.

    Raises OutputError if the target exists or cannot be written, or if the disk has too little free space.
    """
    if target.exists():
        raise _unusable(target, "exists already", "Use --output with a folder that does not exist yet.")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free - _RESERVE_BYTES
        if free_bytes < needed_bytes:
            problem = f"needs {needed_bytes / 1e9:.1f} GB, but only {max(0, free_bytes) / 1e9:.1f} GB are free"
            raise _unusable(target, problem, "Free some space, or choose a folder on another disk with --output.")
        yield partial
        fsync_tree(partial)
        partial.rename(target)  # fails if another process has created the target
        fsync_path(target.parent)
    except OSError as error:
        raise _unusable(
            target, f"cannot be written: {error.strerror or error}", "Choose another folder with --output."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parameter_count(source: ModelSource) -> int:
    """Return the number of parameters of a model without its adapter; 0 if there is no safetensors file."""
    folder = (source.base or source).folder
    headers = [safetensors_header(file) for file in folder.glob("*.safetensors")]
    return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())


def _unusable(target: Path, problem: str, hint: str) -> OutputError:
    return OutputError(code="output_unusable", message=f"The output folder {target} {problem}.", hint=hint, param="output")
