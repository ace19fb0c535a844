"""Find bitsandbytes, which `make setup` installs into a separate folder.

If bitsandbytes were importable, PEFT would import it in each run, which takes 2 s. A run adds the folder to `sys.path` only
if the run's options allow bitsandbytes.
"""

import importlib.util
import sys
from pathlib import Path

from sage.libs.finetune.config import FinetuneConfig

#: Device files of the GPU drivers of NVIDIA, of Windows (WSL) and of AMD.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_gpu() -> bool:
    """Return whether this machine has a GPU driver. This function does not import torch."""
    return any(Path(driver).exists() for driver in _DRIVERS)


def find_bitsandbytes() -> Path | None:
    """Return the folder that contains the package bitsandbytes, or None if bitsandbytes is not installed."""
    if (spec := importlib.util.find_spec("bitsandbytes")) and spec.origin:
        return Path(spec.origin).parents[1]
    aside = Path(sys.prefix) / "quantization"
    return aside if (aside / "bitsandbytes").is_dir() else None


def may_quantize_base(config: FinetuneConfig) -> bool:
    """Return whether the options let the run decide to store the base model in 8 bits."""
    return config.finetuning_type == "lora" and config.use_8bit and config.quantization is None


def make_importable(config: FinetuneConfig) -> None:
    """Add the folder of bitsandbytes to `sys.path` if the config allows bitsandbytes. Call this before importing PEFT."""
    may_use = config.quantization in ("8bit", "4bit") or (may_quantize_base(config) and has_gpu())
    if may_use and (folder := find_bitsandbytes()) and str(folder) not in sys.path:
        sys.path.append(str(folder))
