"""Choose the number formats of a run: fp32, bf16, int8."""

import importlib.util
from dataclasses import dataclass, replace

import torch

from sage.common.errors import ConfigError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.kernels import int8
from sage.libs.finetune.quantization import may_quantize_base
from sage.libs.finetune.run.status import RunStatus
from sage.libs.finetune.training.timing import PROBE_ROWS, least_seconds

#: Minimum measured speedup at which bf16 or int8 is used. Both are less exact than fp32, and bf16 is sometimes slower.
_LEAST_GAIN = 1.25
_PROBE_WIDTH = 768


@dataclass(frozen=True)
class Precision:
    """The number formats of a run, and the reasons for them."""

    bf16: bool  #: whether the base model and the saved activations are in bf16 instead of fp32; adapters are in fp32
    bf16_products: bool  #: whether matrix products are computed in bf16; if False, the operands are cast to fp32
    base_bits: int | None  #: 8 or 4 if bitsandbytes quantizes the base, else None
    int8_products: bool  #: whether SAGE's kernels quantize the frozen layers and use int8 products in training
    why: str  #: reason for bf16 or fp32
    held: str  #: number format of the base model, and the reason
    may_shrink: bool = False  #: whether `shrunk` returns formats that need less memory and are allowed

    @property
    def reason(self) -> str:
        """Text for logs: the chosen number formats, and the reasons."""
        products = "" if self.bf16_products == self.bf16 else ", matrix products in fp32"
        return f"{'bf16' if self.bf16 else 'fp32'}{products}: {self.why}; {self.held}"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.bf16_products else torch.float32

    def shrunk(self) -> "Precision":
        """Return a copy that needs less memory: on a GPU, with an 8-bit base; on a CPU, with bf16 base and activations."""
        if torch.cuda.is_available():
            return replace(self, base_bits=8, may_shrink=False, held="8-bit base (bitsandbytes): memory is scarce")
        return replace(self, bf16=True, may_shrink=False, why=f"memory is scarce; {self.why}")

    def without_kernels(self, asked: str) -> "Precision":
        """Return a copy for a model that the kernels do not support.

        In the copy, stored values and products have the same dtype.
        asked: value of the option `precision`.
        """
        dense = self.without_int8()
        if self.bf16 == self.bf16_products:
            return dense
        return replace(dense, bf16_products=True) if asked == "bf16" else replace(dense, bf16=False)

    def without_int8(self) -> "Precision":
        """Return a copy for a model whose layers do not support int8."""
        if not self.int8_products:
            return self
        return replace(self, int8_products=False, held="base not in int8: the model's layers do not support int8")


def choose_precision(config: FinetuneConfig, begun: RunStatus, width: int) -> Precision:
    """Of the number formats that the config allows, return the fastest on this machine.

    begun: status of the run before this start. A resumed run keeps its number formats.
    width: hidden size of the model.
    """
    base_bits, may_quantize, held = _base(config)
    is_ours = config.method == "sft" and config.finetuning_type == "lora" and config.fast_kernels == "auto"
    may_mix = is_ours and base_bits is None and not torch.cuda.is_available()
    asked = None if config.precision == "auto" else config.precision == "bf16"
    if begun.bf16 is not None:
        # SAGE's int8 kernels need a CPU. Without --quantization, bitsandbytes is used on a GPU only. If a run is resumed on
        # another kind of device, its rounding errors differ.
        is_gpu = torch.cuda.is_available()
        is_int8 = bool(begun.int8_products) and not is_gpu
        base_bits = base_bits or (begun.base_bits if is_gpu else None)
        held = "8-bit base" if is_int8 or base_bits == 8 else held
        return Precision(
            begun.bf16, bool(begun.bf16_products), base_bits, is_int8, "chosen before the run was resumed", held
        )
    if asked is False or (asked and not may_mix):
        return Precision(asked, asked, base_bits, False, "set by --precision", held, may_shrink=may_quantize)
    products, measured = _fastest()
    bf16 = products if asked is None else asked
    is_int8 = False
    if may_mix and may_quantize_base(config):
        is_int8, held = _int8(torch.bfloat16 if products else torch.float32, width)
    return Precision(bf16, products, base_bits, is_int8, measured, held, may_shrink=may_quantize or (may_mix and not bf16))


def _base(config: FinetuneConfig) -> tuple[int | None, bool, str]:
    """Return how bitsandbytes quantizes the base model.

    Returns the bits per weight (None: not quantized), whether the base may be stored in 8 bits if memory is scarce, and the
    reason as text. Raises ConfigError if bitsandbytes is required but not installed.
    """
    if config.finetuning_type == "full" or config.quantization == "none" or not (config.quantization or config.use_8bit):
        return None, False, "base not quantized"
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    if config.quantization:
        if not is_installed:
            raise ConfigError(
                code="bitsandbytes_missing",
                message=f"quantization={config.quantization} needs bitsandbytes, which is not installed.",
                hint="Install bitsandbytes (in SAGE's environment: `pip install 'sage-libs[quantization]'`), or omit "
                "--quantization.",
                param="quantization",
            )
        return int(config.quantization[0]), False, f"{config.quantization} base (bitsandbytes)"
    if not torch.cuda.is_available():
        return None, False, "base not quantized"
    why = "memory is not scarce" if is_installed else "bitsandbytes is not installed"
    return None, is_installed, f"base not in 8 bits: {why}"


def _int8(dtype: torch.dtype, width: int) -> tuple[bool, str]:
    gain, why = int8.measured_speedup(width, dtype)
    is_faster = gain >= _LEAST_GAIN
    return is_faster, f"{'8-bit base' if is_faster else 'base not in int8'}: {why}"


def _fastest() -> tuple[bool, str]:
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported()
        return has_bf16, f"the GPU {'has' if has_bf16 else 'lacks'} bf16 instructions"
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False, "the processor lacks bf16 instructions"
    gain = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    return gain >= _LEAST_GAIN, f"bf16 matrix products are {gain:.1f} times as fast as fp32 (measured)"


def _product_seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(PROBE_ROWS, _PROBE_WIDTH, dtype=dtype), torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
    return least_seconds(lambda: left @ right.t())
