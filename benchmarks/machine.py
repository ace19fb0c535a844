"""Name the machine of a benchmark, and the file for its results."""

import os
from pathlib import Path

from sage.llm.control_plane.backends.speeds import processor
from sage.llm.control_plane.inventory.gpus import list_gpus

_RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Return the name of the processor, the number of cores, and the names of the GPUs."""
    return ", ".join([processor(), f"{os.cpu_count()} cores", *(gpu.name for gpu in list_gpus())])


def results(name: str) -> Path:
    """Return the path for the results of a benchmark: `results/NAME`. On a machine with a GPU, `gpu-` precedes the name."""
    return _RESULTS / f"{'gpu-' if list_gpus() else ''}{name}"
