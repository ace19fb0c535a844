"""Products with a frozen matrix in 8-bit integers, in both directions from one copy of it.

The other operand is made 8 bits wide row by row, each with a scale of its own. Where some of its columns are much larger
than others, a factor for each column moves a part of that into the matrix, so that what is small beside it is not lost.
Sources: Xiao et al. 2023, "SmoothQuant", for the factors; Wortsman et al. 2023, "Stable and low-precision training for
large-scale vision-language models" (SwitchBack), for 8 bits on the way back as well.
"""

import ctypes
import math
import threading
from pathlib import Path

import torch
from torch import Tensor

from sage.libs.finetune.kernels.native import library
from sage.libs.finetune.training.timing import PROBE_ROWS, least_seconds

_SOURCE = Path(__file__).with_name("int8.c")
_MOST = 127
#: Instructions of processors that multiply 8-bit integers faster than floats.
_INSTRUCTIONS = ("avx512_vnni", "amx_int8", "avx_vnni")
_held = threading.local()


class Int8Matrix:
    """A matrix of (outputs, inputs) in 8 bits: integers[o, i] * scales[o] * factors[i]."""

    def __init__(self, weight: Tensor, peaks: Tensor) -> None:
        """weight: (outputs, inputs).  peaks: (inputs,), the largest values met in what it is multiplied with."""
        wide, least = weight.float(), torch.finfo(torch.float32).tiny
        across = wide.abs().amax(0)
        self._factors = (across.clamp_min(least) / peaks.float().clamp_min(least)).sqrt_()
        self._factors[(across == 0) | (peaks == 0)] = 1.0
        wide = wide / self._factors
        self._scales = wide.abs().amax(1).clamp_min_(least) / _MOST
        self._integers = (wide / self._scales[:, None]).round_().to(torch.int8)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix, as it is held, in numbers of `dtype`."""
        return self._integers.to(dtype).mul_(self._scales[:, None]).mul_(self._factors)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs @ matrix.t(), (rows, outputs), in the dtype of (rows, inputs): bf16 or fp32."""
        integers, scales = quantize(inputs, self._factors)
        outputs = inputs.new_empty(inputs.shape[0], self._integers.shape[0])
        return rescale(_sums(integers, self._integers.t()), scales, self._scales, outputs)

    def backward(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return grad @ matrix, (rows, inputs), in the dtype of (rows, outputs), or `onto` with it added in place."""
        integers, scales = quantize(grad, self._scales)
        adds = onto is not None
        outputs = grad.new_empty(grad.shape[0], self._integers.shape[1]) if onto is None else onto
        return rescale(_sums(integers, self._integers), scales, self._factors, outputs, adds=adds)


def quantize(numbers: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, columns) numbers times the factors of their columns as integers, and the scale of each row.

    A row that holds what is no number gets a scale that is none either.
    """
    native, _ = library(_SOURCE)
    if native is None:
        wide = numbers.float() * factors
        largest = wide.abs().amax(1)
        inverse = torch.where(largest == 0, 0.0, _MOST / largest)
        wide *= inverse[:, None]
        integers = (wide + torch.where(wide < 0, -0.5, 0.5)).nan_to_num_().to(torch.int8)
        return integers, largest / _MOST
    if numbers.stride(1) != 1:
        numbers = numbers.contiguous()
    rows, columns = numbers.shape
    integers, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    native.quantize(
        _at(numbers), _is_wide(numbers), _at(factors),
        *map(ctypes.c_long, (rows, columns, numbers.stride(0))), _at(integers), _at(scales),
    )  # fmt: skip
    return integers, scales


def rescale(sums: Tensor, scales: Tensor, factors: Tensor, numbers: Tensor, *, adds: bool = False) -> Tensor:
    """Return `numbers` with (rows, columns) sums times their rows' scales and columns' factors in it, or added to it."""
    native, _ = library(_SOURCE)
    if native is None:
        scaled = sums.float().mul_(scales[:, None]).mul_(factors)
        return numbers.copy_(numbers.float() + scaled if adds else scaled)
    native.rescale(
        _at(sums), _at(scales), _at(factors), *map(ctypes.c_long, sums.shape), _at(numbers), _is_wide(numbers), adds
    )
    return numbers


def gain(width: int, dtype: torch.dtype) -> tuple[float, str]:
    """Return how much faster 8-bit products are here than those in `dtype`, 0 where they cannot be, and why."""
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in _INSTRUCTIONS):
        return 0.0, "the processor lacks instructions for 8-bit products"
    native, problem = library(_SOURCE)
    if native is None:
        return 0.0, problem
    numbers, weight = torch.ones(PROBE_ROWS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    matrix = Int8Matrix(weight, torch.ones(width))
    times = least_seconds(lambda: numbers @ weight.t()) / least_seconds(lambda: matrix.forward(numbers))
    return times, f"measured, products in 8 bits are {times:.1f} times as fast"


def _sums(integers: Tensor, matrix: Tensor) -> Tensor:
    """Return integers @ matrix, int32, in memory that the next call uses again: so it stays in the processor's cache."""
    shape = integers.shape[0], matrix.shape[1]
    held: Tensor | None = getattr(_held, "sums", None)
    if held is None or held.numel() < math.prod(shape):
        held = _held.sums = torch.empty(math.prod(shape), dtype=torch.int32)
    out = held[: math.prod(shape)].view(shape)
    torch._int_mm(integers, matrix, out=out)  # noqa: SLF001 - torch has no other name for it
    return out


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _is_wide(tensor: Tensor) -> bool:
    assert tensor.dtype in (torch.bfloat16, torch.float32), tensor.dtype
    return tensor.dtype is torch.float32
