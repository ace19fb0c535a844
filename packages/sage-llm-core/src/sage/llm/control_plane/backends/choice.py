"""Choose a backend for an engine that names none."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sage.common.files import replace_file
from sage.common.paths import get_user_paths
from sage.llm.control_plane.backends.base import Backend

#: Tokens per second with 16 answers at once, relative to transformers, by kind of device; source:
#: benchmarks/results/serving.md. There are no measurements on a GPU yet: the figure only makes vLLM the first choice.
RELATIVE_SPEEDS: Mapping[str, Mapping[str, float]] = {
    "cpu": {"transformers": 1.0},
    "cuda": {"vllm": 2.0, "transformers": 1.0},
}


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of the backends on this machine, as `sage backend benchmark` measured them."""

    device: str
    processor: str
    model: str
    date: str
    tokens_per_second: Mapping[str, float]  #: by backend, with 16 answers at once


def _file() -> Path:
    return get_user_paths().data_dir / "backends" / "speeds.json"


def save_speeds(speeds: Speeds) -> Path:
    """Write the measurements of this machine, which `auto` then uses; return their path."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    replace_file(_file(), json.dumps(asdict(speeds), indent=2).encode())
    return _file()


def saved_speeds(device: str) -> Speeds | None:
    """Return the measurements of this machine, or None if there are none for its processor and kind of device."""
    try:
        speeds = Speeds(**json.loads(_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return speeds if (speeds.device, speeds.processor) == (device, processor()) else None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def choose(candidates: Sequence[Backend], device: str) -> tuple[Backend, str]:
    """Return the fastest of the installed backends `candidates`, and the reason for users.

    If some of them can load adapters into a running server, only these are compared, so that an adapter can join its base.
    """
    compared = [backend for backend in candidates if backend.capabilities.hot_adapters] or list(candidates)
    if len(compared) == 1:
        which = "that loads adapters into a running server" if compared[0].capabilities.hot_adapters else "for this model"
        return compared[0], f"the only installed backend {which}"
    measured = saved_speeds(device)
    speeds = measured.tokens_per_second if measured else RELATIVE_SPEEDS.get(device, {})
    fastest = max(compared, key=lambda backend: speeds.get(backend.name, 0.0))
    if measured:
        return fastest, f"the fastest in `sage backend benchmark` of {measured.date}"
    return fastest, f"the first choice for the device {device}; `sage backend benchmark MODEL` measures all on this machine"
