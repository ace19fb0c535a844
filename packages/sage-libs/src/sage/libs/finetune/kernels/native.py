"""Compile the C kernels once per type of processor, and store them in the cache folder."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from sage.common.paths import get_user_paths, private_folder

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
_COMPILE_SECONDS = 60


@functools.cache
def library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """Compile a C file and load it. Return the library and "", or None and the reason why there is no library."""
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C compiler (cc)"
    identity = "\n".join([source.read_text(), *compiler, *_FLAGS, _processor()])
    target = (
        get_user_paths().cache_dir / "kernels" / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    )
    try:
        if not target.exists():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target)), ""
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"{source.name} cannot be compiled or loaded: {lines[0] if lines else type(error).__name__}"


def _compiler() -> list[str] | None:
    given = os.environ.get("CC")
    for command in [given] if given else ["cc", "gcc", "clang"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    private_folder(target.parent)  # other users must not write to the folder, because SAGE executes the files in it
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [*compiler, *_FLAGS, str(source), "-o", str(made)],
            check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS,
        )  # fmt: skip
        made.replace(target)  # atomic, because another process can compile the same file at the same time


def _processor() -> str:
    """Return the model and features of the processor. The cache key contains them, because machines can share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
