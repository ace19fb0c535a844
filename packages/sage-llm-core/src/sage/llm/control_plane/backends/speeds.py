"""The speeds of the backends on this machine, as `sage backend benchmark` measured them."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sage.common.files import replace_file
from sage.common.paths import get_user_paths


@dataclass(frozen=True)
class Speeds:
    """The result of a benchmark."""

    device: str
    processor: str
    model: str
    date: str
    tokens_per_second: Mapping[str, float]  #: speed of each backend with 16 concurrent requests


def _file() -> Path:
    return get_user_paths().data_dir / "backends" / "speeds.json"


def save_speeds(speeds: Speeds) -> Path:
    """Write the measurements to the file that is read when a backend is chosen automatically."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    replace_file(_file(), json.dumps(asdict(speeds), indent=2).encode())
    return _file()


def saved_speeds(device: str) -> Speeds | None:
    """Return the saved measurements for this processor and a kind of device, or None if there are no such measurements."""
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
