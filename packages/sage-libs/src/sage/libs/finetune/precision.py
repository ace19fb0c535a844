"""In which numbers a run computes."""

import importlib.util
import time
from dataclasses import dataclass

import torch

from sage.libs.finetune.config import FinetuneConfig

#: bf16 is taken from this gain on: it rounds more, and some processors have its instructions but are slower with them.
_LEAST_GAIN = 1.25
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_REPEATS = 512, 768, 7


@dataclass(frozen=True)
class Precision:
    """In which numbers a run computes, and why."""

    bf16: bool  #: base and matrix products in bf16; the adapters stay fp32
    base_8bit: bool
    reason: str


def choose_precision(config: FinetuneConfig, begun_in_bf16: bool | None) -> Precision:
    """Return the numbers that this machine computes fastest in, as far as the run leaves the choice.

    begun_in_bf16: what a run that goes on was begun with; None for a new one.
    """
    if torch.cuda.is_available():
        base_8bit = config.use_8bit and importlib.util.find_spec("bitsandbytes") is not None
        why_8bit = "8-bit base (bitsandbytes)" if base_8bit else "base not in 8 bits: bitsandbytes is not installed"
    else:
        base_8bit, why_8bit = False, "base not in 8 bits: bitsandbytes' 8-bit layers need CUDA"
    if config.precision != "auto":
        bf16, why = config.precision == "bf16", "asked for"
    elif begun_in_bf16 is not None:
        bf16, why = begun_in_bf16, "as the run was begun"
    else:
        bf16, why = _fastest()
    return Precision(
        bf16, base_8bit, f"{'bf16' if bf16 else 'fp32'}: {why}; {why_8bit if config.use_8bit else 'whole base'}"
    )


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
