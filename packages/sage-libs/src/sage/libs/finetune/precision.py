"""In which numbers a run computes."""

import importlib.util
import time
from dataclasses import dataclass

import torch

from sage.common.errors import ConfigError
from sage.libs.finetune.config import FinetuneConfig

#: bf16 is taken from this gain on: it rounds more, and some processors have its instructions but are slower with them.
_LEAST_GAIN = 1.25
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_REPEATS = 512, 768, 7


@dataclass(frozen=True)
class Precision:
    """In which numbers a run computes, and why."""

    bf16: bool  #: base and matrix products in bf16; the adapters stay fp32
    base_bits: int | None  #: of the base's weights where bitsandbytes holds them, 8 or 4
    reason: str


def choose_precision(config: FinetuneConfig, begun_in_bf16: bool | None) -> Precision:
    """Return the numbers that this machine computes fastest in, as far as the run leaves the choice.

    begun_in_bf16: what a run that goes on was begun with; None for a new one.
    """
    base_bits, held = _base(config)
    if config.precision != "auto":
        bf16, why = config.precision == "bf16", "asked for"
    elif begun_in_bf16 is not None:
        bf16, why = begun_in_bf16, "as the run was begun"
    else:
        bf16, why = _fastest()
    return Precision(bf16, base_bits, f"{'bf16' if bf16 else 'fp32'}: {why}; {held}")


def _base(config: FinetuneConfig) -> tuple[int | None, str]:
    """Return in how many bits the base is held, None for whole, and why.

    Raises ConfigError where it was asked for and cannot be.
    """
    if config.finetuning_type == "full" or config.quantization == "none" or not (config.quantization or config.use_8bit):
        return None, "whole base"
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    if config.quantization:
        if not is_installed:
            raise ConfigError(
                code="bitsandbytes_missing",
                message=f"quantization={config.quantization} needs bitsandbytes, which is not installed.",
                hint="Install it beside SAGE (`pip install bitsandbytes`), or leave --quantization away.",
                param="quantization",
            )
        return int(config.quantization[0]), f"{config.quantization} base (bitsandbytes)"
    if not torch.cuda.is_available():
        return None, "base not in 8 bits: measured, that is slower on a CPU"
    return (8, "8-bit base (bitsandbytes)") if is_installed else (None, "base not in 8 bits: bitsandbytes is not installed")


def _fastest() -> tuple[bool, str]:
    """Return whether bf16 is the faster choice here, and why."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported()
        return has_bf16, f"the GPU {'has' if has_bf16 else 'lacks'} bf16 instructions"
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False, "the processor lacks bf16 instructions"
    gain = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    return gain >= _LEAST_GAIN, f"measured, this processor multiplies bf16 at {gain:.1f} times the speed of fp32"


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the least time of some matrix products of a layer's size, about a millisecond each."""
    left, right = torch.ones(_PROBE_ROWS, _PROBE_WIDTH, dtype=dtype), torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
    best = float("inf")
    for _ in range(_PROBE_REPEATS):
        began = time.perf_counter()
        left @ right.t()
        best = min(best, time.perf_counter() - began)
    return best
