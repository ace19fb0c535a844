"""In which numbers a run computes."""

import importlib.util
from dataclasses import dataclass, replace

import torch

from sage.common.errors import ConfigError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.kernels import int8
from sage.libs.finetune.run.status import RunStatus
from sage.libs.finetune.training.timing import PROBE_ROWS, least_seconds

#: bf16 is taken from this gain on: it rounds more, and some processors have its instructions but are slower with them.
_LEAST_GAIN = 1.25
_PROBE_WIDTH = 768


@dataclass(frozen=True)
class Precision:
    """In which numbers a run computes, and why."""

    bf16: bool  #: base and what is kept for the way back are in bf16, else in fp32; the adapters always are in fp32
    bf16_products: bool  #: and so are matrix products; else their operands are first made fp32
    base_bits: int | None  #: of the base's weights where bitsandbytes holds them, 8 or 4
    int8_products: bool  #: whether layers are held in 8 bits by our own step and, in training, multiplied so
    why: str
    held: str  #: in what the base is held, and why
    may_shrink: bool = False  #: whether base and activations may go to bf16 where memory is scarce, for some of the speed

    @property
    def reason(self) -> str:
        """The choice and why, for people."""
        products = "" if self.bf16_products == self.bf16 else ", multiplied in fp32"
        return f"{'bf16' if self.bf16 else 'fp32'}{products}: {self.why}; {self.held}"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The numbers that matrix products are computed in."""
        return torch.bfloat16 if self.bf16_products else torch.float32

    def shrunk(self) -> "Precision":
        """Return it with base and activations in bf16."""
        return replace(self, bf16=True, may_shrink=False, why=f"memory is scarce, and {self.why}")

    def without_kernels(self, config: FinetuneConfig) -> "Precision":
        """Return what is left of it for a model that does not take our step: one kind of numbers for everything."""
        whole = self.without_int8()
        if self.bf16 == self.bf16_products:
            return whole
        return replace(whole, bf16_products=True) if config.precision == "bf16" else replace(whole, bf16=False)

    def without_int8(self) -> "Precision":
        """Return it for a model whose layers stay whole."""
        if not self.int8_products:
            return self
        return replace(self, int8_products=False, held="base not in 8 bits: the model's layers do not take it")


def choose_precision(config: FinetuneConfig, begun: RunStatus, width: int) -> Precision:
    """Return the numbers that this machine computes fastest in, as far as the run leaves it open.

    begun: what is known of the run; one that goes on keeps the numbers that it was begun with.
    width: of the model's layers.
    """
    base_bits, held = _base(config)
    is_ours = config.method == "sft" and config.finetuning_type == "lora" and config.fast_kernels == "auto"
    may_mix = is_ours and base_bits is None and not torch.cuda.is_available()
    asked = None if config.precision == "auto" else config.precision == "bf16"
    if begun.bf16 is not None:
        is_int8 = bool(begun.int8_products)
        held = "8-bit base" if is_int8 else held
        return Precision(begun.bf16, bool(begun.bf16_products), base_bits, is_int8, "as the run was begun", held)
    if asked is False or (asked and not may_mix):
        return Precision(asked, asked, base_bits, False, "asked for", held)
    products, measured = _fastest()
    bf16 = products if asked is None else asked
    is_int8 = False
    if may_mix and config.use_8bit and config.quantization is None:
        is_int8, held = _int8(torch.bfloat16 if products else torch.float32, width)
    return Precision(bf16, products, base_bits, is_int8, measured, held, may_shrink=may_mix and not bf16)


def _base(config: FinetuneConfig) -> tuple[int | None, str]:
    """Return in how many bits bitsandbytes holds the base, None for not at all, and why.

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
        return None, "whole base"
    return (8, "8-bit base (bitsandbytes)") if is_installed else (None, "base not in 8 bits: bitsandbytes is not installed")


def _int8(dtype: torch.dtype, width: int) -> tuple[bool, str]:
    """Return whether layers of this width are faster in 8 bits than in `dtype`, and why."""
    gain, why = int8.gain(width, dtype)
    is_faster = gain >= _LEAST_GAIN
    return is_faster, f"{'8-bit base' if is_faster else 'base not in 8 bits'}: {why}"


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
    left, right = torch.ones(PROBE_ROWS, _PROBE_WIDTH, dtype=dtype), torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
    return least_seconds(lambda: left @ right.t())
