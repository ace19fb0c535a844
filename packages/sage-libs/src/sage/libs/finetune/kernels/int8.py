"""Int8 matrix products with a frozen weight. The forward and the backward pass use the same int8 copy of the weight.

Activations are quantized with one scale per row. If the values in some columns are much larger than in others, the columns
with small values would lose precision. Therefore each column of the activations is multiplied by a factor, and the same
column of the weight is divided by this factor.
Sources: Xiao et al. 2023, "SmoothQuant", for the factors; Wortsman et al. 2023, "Stable and low-precision training for
large-scale vision-language models" (SwitchBack), for int8 in the backward pass.
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
_INT8_MAX = 127
#: Processor instructions that make int8 products faster than floating-point products.
_INSTRUCTIONS = ("avx512_vnni", "amx_int8", "avx_vnni")
_scratch = threading.local()


class Int8Matrix:
    """An int8 weight of shape (outputs, inputs). Element [o, i] is integers[o, i] * scales[o] * factors[i]."""

    def __init__(self, weight: Tensor, activation_absmax: Tensor) -> None:
        """weight: (outputs, inputs).  activation_absmax: (inputs,), the largest absolute value of each input feature."""
        wide, tiny = weight.float(), torch.finfo(torch.float32).tiny
        weight_absmax = wide.abs().amax(0)
        self._factors = (weight_absmax.clamp_min(tiny) / activation_absmax.float().clamp_min(tiny)).sqrt_()
        self._factors[(weight_absmax == 0) | (activation_absmax == 0)] = 1.0
        wide = wide / self._factors
        self._scales = wide.abs().amax(1).clamp_min_(tiny) / _INT8_MAX
        self._integers = (wide / self._scales[:, None]).round_().to(torch.int8)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in `dtype`."""
        return self._integers.to(dtype).mul_(self._scales[:, None]).mul_(self._factors)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs @ weight.t(), with the shape (rows, outputs), in the dtype of `inputs`.

        inputs: bf16 or fp32, with the shape (rows, number of inputs).
        """
        integers, scales = quantize(inputs, self._factors)
        outputs = inputs.new_empty(inputs.shape[0], self._integers.shape[0])
        return rescale(_int_matmul(integers, self._integers.t()), scales, self._scales, outputs)

    def backward(self, grad: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return grad @ weight, with the shape (rows, inputs), in the dtype of `grad`.

        onto: tensor to which the product is added in place, and which is returned; None: a new tensor is returned.
        """
        integers, scales = quantize(grad, self._scales)
        adds = onto is not None
        outputs = grad.new_empty(grad.shape[0], self._integers.shape[1]) if onto is None else onto
        return rescale(_int_matmul(integers, self._integers), scales, self._factors, outputs, adds=adds)


def quantize(numbers: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply `numbers` (rows, columns) by the column factors, and quantize the products.

    Return int8 values and one scale per row. If a row contains NaN, the scale of the row is NaN.
    """
    native, _ = library(_SOURCE)
    if native is None:
        wide = numbers.float() * factors
        largest = wide.abs().amax(1)
        inverse = torch.where(largest == 0, 0.0, _INT8_MAX / largest)
        wide *= inverse[:, None]
        integers = (wide + torch.where(wide < 0, -0.5, 0.5)).nan_to_num_().to(torch.int8)
        return integers, largest / _INT8_MAX
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
    """Multiply int32 sums (rows, columns) by row scales and column factors, and write the products into `numbers`.

    adds: whether the old values of `numbers` are added to the products.  Returns `numbers`.
    """
    native, _ = library(_SOURCE)
    if native is None:
        scaled = sums.float().mul_(scales[:, None]).mul_(factors)
        return numbers.copy_(numbers.float() + scaled if adds else scaled)
    native.rescale(
        _at(sums), _at(scales), _at(factors), *map(ctypes.c_long, sums.shape), _at(numbers), _is_wide(numbers), adds
    )
    return numbers


def measured_speedup(width: int, dtype: torch.dtype) -> tuple[float, str]:
    """Return the speedup of int8 products over products in `dtype` (0 if int8 is not supported), and an explanation."""
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in _INSTRUCTIONS):
        return 0.0, "the processor lacks int8 instructions"
    native, problem = library(_SOURCE)
    if native is None:
        return 0.0, problem
    numbers, weight = torch.ones(PROBE_ROWS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    matrix = Int8Matrix(weight, torch.ones(width))
    speedup = least_seconds(lambda: numbers @ weight.t()) / least_seconds(lambda: matrix.forward(numbers))
    return speedup, f"int8 matrix products are {speedup:.1f} times as fast (measured)"


def _int_matmul(integers: Tensor, matrix: Tensor) -> Tensor:
    """Return integers @ matrix as int32, in a buffer of the thread. The next call in this thread overwrites the result."""
    shape = integers.shape[0], matrix.shape[1]
    buffer: Tensor | None = getattr(_scratch, "sums", None)
    if buffer is None or buffer.numel() < math.prod(shape):
        buffer = _scratch.sums = torch.empty(math.prod(shape), dtype=torch.int32)
    out = buffer[: math.prod(shape)].view(shape)
    torch._int_mm(integers, matrix, out=out)  # noqa: SLF001 - has no public name
    return out


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _is_wide(tensor: Tensor) -> bool:
    assert tensor.dtype in (torch.bfloat16, torch.float32), tensor.dtype
    return tensor.dtype is torch.float32
