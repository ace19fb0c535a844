"""Checks of `sage doctor`: installed packages, processors and memory, torch."""

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
from packaging.requirements import Requirement

from sage.cli.findings import WITHOUT_LOCAL, Finding, last_line
from sage.common.cgroups import available_cores, memory_limits

_PACKAGES = ("sage-common", "sage-libs", "sage-llm-client", "sage-llm-core", "sage-llm-gateway", "sage-cli", "sage-studio")
#: If less main memory than this is available, even small engines can fail to start.
_LOW_MEMORY_BYTES = 10**9
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": gpus, "threads": torch.get_num_threads()}))
"""
_TORCH_SECONDS = 120


def packages() -> Iterator[Finding]:
    """Check that SAGE's installed packages have the same version, and that their dependencies have suitable versions."""
    own = {name: found for name in _PACKAGES if (found := _version(name))}
    yield Finding("python", "ok", f"{platform.python_version()} in {sys.prefix}, sage {own['sage-cli']}")
    unsuitable = [text for name in own for text in _unsuitable(name)]
    if unsuitable:
        remedy = f"Install the packages again: pip install --upgrade {' '.join(own)}."
        yield Finding(
            "packages", "failed", f"Packages are missing or have unsuitable versions: {'; '.join(unsuitable)}.", remedy
        )
    else:
        yield Finding("packages", "ok", f"{', '.join(own)}; all dependencies have suitable versions")


def _unsuitable(name: str) -> Iterator[str]:
    """Yield the dependencies of a package that are missing or have an unsuitable version."""
    for requirement in map(Requirement, requires(name) or ()):
        found = _version(requirement.name)
        is_optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if found is None and not is_optional:
            yield f"{requirement.name} is missing ({name} needs it)"
        elif found is not None and not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found} ({name} needs {requirement.specifier})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Finding:
    """Check the CPU cores and the main memory that this user may use."""
    memory = psutil.virtual_memory()
    limits = [limit.limit_bytes for limit in memory_limits() if limit.limit_bytes < memory.total]
    limit = f", limited to {min(limits) / 1e9:.1f} GB by a control group" if limits else ""
    text = f"{available_cores()} CPU cores, {memory.total / 1e9:.1f} GB of main memory{limit}"
    text += f", {memory.available / 1e9:.1f} GB free"
    if memory.available < _LOW_MEMORY_BYTES:
        return Finding("devices", "warning", text, "Stop other programs; `sage gpu` shows how much memory each engine uses.")
    return Finding("devices", "ok", text)


def torch() -> Iterator[Finding]:
    """Check that torch can be imported and that it can use the GPU."""
    if importlib.util.find_spec("torch") is None:
        yield Finding(
            "torch", "warning", "torch is not installed; training and the backend transformers need torch.", WITHOUT_LOCAL
        )
        return
    from sage.libs.finetune import quantization

    done = subprocess.run(  # in a separate process, because the import of torch takes seconds and may fail
        [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False
    )
    if done.returncode:
        problem = last_line(done.stderr)
        yield Finding("torch", "failed", f"torch cannot be imported: {problem}.", "Install torch again for this machine.")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    gpus = ", ".join(found["gpus"]) or "no GPU"
    yield Finding("torch", "ok", f"{found['version']}, {gpus}, {found['threads']} CPU threads")
    if quantization.has_gpu() and not found["gpus"]:
        remedy = "Install a build of torch for CUDA, and check `nvidia-smi`."
        yield Finding("gpu", "failed", "This machine has a GPU, but torch cannot use it.", remedy)
    if folder := quantization.find_bitsandbytes():
        yield Finding("bitsandbytes", "ok", f"in {folder}")
    elif found["gpus"]:
        remedy = "Install it to quantize base models: pip install 'sage-libs[quantization]'."
        yield Finding("bitsandbytes", "warning", "bitsandbytes is not installed.", remedy)
