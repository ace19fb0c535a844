"""Combine linear layers that have the same input into one larger layer. Their LoRA adapters become one larger adapter.

The adapter parameters are read from PEFT's modules at every call, and receive gradients. The frozen weights receive no
gradients. In shapes, `outputs` is the sum of the layers' out_features, and `ranks` is the sum of the adapters' ranks.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": y = W x + (alpha / rank) B A x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sage.libs.finetune.kernels.int8 import Int8Matrix
from sage.libs.finetune.kernels.norm import recompute, saved
from sage.libs.finetune.kernels.product import product

#: Maximum relative error of a product with a quantized weight. In SmolLM2 the errors are 1 to 3 %.
_INT8_TOLERANCE = 0.1


@dataclass(frozen=True)
class Adapter:
    """Position and scaling of one adapter: its columns in the outputs, and its rows in the stacked matrix A."""

    columns: slice
    rows: slice
    scaling: float


@dataclass(frozen=True)
class StackedAdapters:
    """The adapters of several layers as two matrices, in the compute dtype."""

    adapters: list[Adapter]
    lora_a: Tensor  #: (ranks, in_features): the concatenated matrices A
    lora_b: Tensor  #: (outputs, ranks): the scaled matrices B on the block diagonal


class Projections:
    """Linear layers with the same input. The layers' weights become views of one matrix, so no weight is stored twice."""

    def __init__(self, layers: Sequence[nn.Module], compute_dtype: torch.dtype | None = None) -> None:
        """layers: all must be fusible (`is_fusible`).  compute_dtype: dtype of products; default: dtype of the weights."""
        self._layers = tuple(layers)
        bases = [_base(layer) for layer in layers]
        self._widths = [base.out_features for base in bases]
        self.weight = bases[0].weight.data if len(bases) == 1 else torch.cat([base.weight.data for base in bases])
        self._assign_views(self.weight)
        self._int8: Int8Matrix | None = None
        self._recorded: list[Tensor] | None = None
        self.compute_dtype = compute_dtype or self.weight.dtype
        self.bias = None
        if any(base.bias is not None for base in bases):
            zeros = self.weight.new_zeros
            self.bias = torch.cat([zeros(base.out_features) if base.bias is None else base.bias.data for base in bases])

    def record_inputs(self) -> None:
        """Record all inputs of `forward` until `quantize` is called."""
        self._recorded = []

    def quantize(self) -> float | None:
        """Quantize the weights to int8, use int8 products in training, and free the dense weights.

        Returns the relative error of the int8 product for the recorded inputs. If no inputs were recorded or the error is
        too large, the dense weights stay in use, and None is returned.
        """
        recorded, self._recorded = self._recorded, None
        if not recorded:
            return None
        inputs = torch.cat(recorded)
        matrix = Int8Matrix(self.weight, inputs.abs().amax(0))
        expected = inputs @ self.weight.to(self.compute_dtype).t()
        error = float((matrix.forward(inputs) - expected).norm() / expected.norm())
        if not error < _INT8_TOLERANCE:
            return None
        self._int8 = matrix
        self.free_dense_weights()
        return error

    def free_dense_weights(self) -> None:
        """Free the layers' dense weights if an int8 copy exists."""
        if self._int8:
            self.weight = self.weight.new_empty(0)
            for layer in self._layers:
                _base(layer).weight.data = self.weight

    def restore_dense_weights(self) -> None:
        """If an int8 copy exists, restore the dense weights from this copy. Modules of transformers need dense weights."""
        if self._int8:
            self._assign_views(self._int8.dequantize(self.weight.dtype))

    def parameters(self) -> list[Tensor]:
        """Return the matrices A and B of each active adapter, in the order of the layers."""
        return [matrix for _, a, b, _ in self._active() for matrix in (a, b)]

    def stack(self, parameters: Sequence[Tensor]) -> StackedAdapters | None:
        """Stack the adapters, or return None if no adapter is active.  parameters: the result of `parameters()`."""
        if not parameters:
            return None
        lora_a = torch.cat(list(parameters[0::2])).to(self.compute_dtype)
        lora_b = lora_a.new_zeros(sum(self._widths), lora_a.shape[0])
        adapters, row = [], 0
        for (column, _, _, scaling), matrix in zip(self._active(), parameters[1::2], strict=True):
            width, rank = matrix.shape
            adapter = Adapter(slice(column, column + width), slice(row, row + rank), scaling)
            lora_b[adapter.columns, adapter.rows] = matrix * scaling
            adapters.append(adapter)
            row += rank
        return StackedAdapters(adapters, lora_a, lora_b)

    def forward(self, inputs: Tensor, stacked: StackedAdapters | None) -> tuple[Tensor, Tensor | None]:
        """Return the outputs W x + bias + B A x, of shape (tokens, outputs), and the products A x, of shape (tokens, ranks).

        A and B are the matrices in `stacked`. If `stacked` is None, the outputs are W x + bias, and the products are None.
        inputs: shape (tokens, in_features). The outputs have the dtype of the weights.
        """
        inputs = inputs.to(self.compute_dtype)
        if self._recorded is not None:
            self._recorded.append(inputs)
        if self._int8 and self._layers[0].training:
            outputs = self._int8.forward(inputs)
        else:
            weight = self._int8.dequantize(self.compute_dtype) if self._int8 else self.weight.to(self.compute_dtype)
            outputs = product(inputs, weight.t())
        if self.bias is not None:
            outputs += self.bias
        inner = None
        if stacked is not None:
            inner = inputs @ stacked.lora_a.t()
            outputs.addmm_(inner, stacked.lora_b.t())
        return outputs.to(self.weight.dtype), inner

    def backward(
        self,
        grad: Tensor,
        inputs: Tensor,
        stacked: StackedAdapters | None,
        inner: Tensor | None,
        *,
        onto: Tensor | None = None,
        needs_inputs: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradient of the inputs and the gradients of `parameters()`.

        grad: gradient of the outputs, of shape (tokens, outputs).
        onto: another gradient of the same inputs, with dtype `compute_dtype`. The new gradient is added to `onto` in place.
        """
        grad = grad.to(self.compute_dtype)
        grad_inputs = None
        if needs_inputs and self._int8:
            grad_inputs = self._int8.backward(grad, onto)
        elif needs_inputs:
            grad_inputs = product(grad, self.weight.to(self.compute_dtype), onto)
        if stacked is None or inner is None:
            return grad_inputs, []
        grad_inner = grad @ stacked.lora_b
        if grad_inputs is not None:
            grad_inputs.addmm_(grad_inner, stacked.lora_a)
        grad_lora_a = grad_inner.to(inputs.dtype).t() @ inputs
        gradients = []
        for adapter in stacked.adapters:
            grad_lora_b = grad[:, adapter.columns].t() @ inner[:, adapter.rows]
            gradients += [grad_lora_a[adapter.rows], grad_lora_b * adapter.scaling]
        return grad_inputs, gradients

    def _assign_views(self, weight: Tensor) -> None:
        for layer, rows in zip(self._layers, weight.split(self._widths), strict=True):
            _base(layer).weight.data = rows

    def _active(self) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Yield the first output column, the matrices A and B, and the scaling of each active adapter."""
        column = 0
        for layer, width in zip(self._layers, self._widths, strict=True):
            if isinstance(layer, LoraLinear) and not layer.disable_adapters:
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        yield column, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            column += width


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, source: Sequence[Tensor], projections: Projections, *parameters: Tensor) -> Tensor:
        ctx.projections, ctx.stacked = projections, projections.stack(parameters)
        outputs, ctx.inner = projections.forward(inputs, ctx.stacked)
        ctx.save_for_backward(*source)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = recompute(ctx.saved_tensors)
        grad_inputs, gradients = ctx.projections.backward(
            grad, inputs, ctx.stacked, ctx.inner, needs_inputs=ctx.needs_input_grad[0]
        )
        return grad_inputs if grad_inputs is None else grad_inputs.to(inputs.dtype), None, None, *gradients


def project(inputs: Tensor, projections: Projections) -> Tensor:
    """Return the concatenated outputs of all layers, of shape (tokens, outputs).  inputs: shape (…, in_features)."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return _Project.apply(flat, saved(inputs), projections, *projections.parameters())


def is_fusible(layer: nn.Module) -> bool:
    """Return whether a layer is a frozen linear layer, either plain or with standard LoRA adapters.

    A standard LoRA adapter has no dropout and no bias.
    """
    if isinstance(layer, LoraLinear):
        is_plain = not layer.lora_variant and not layer.merged and not any(layer.lora_bias.values())
        has_no_dropout = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        return is_plain and has_no_dropout and type(layer) is LoraLinear and is_fusible(layer.base_layer)
    return type(layer) is nn.Linear and not layer.weight.requires_grad


def _base(layer: nn.Module) -> nn.Linear:
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    assert isinstance(base, nn.Linear)
    return base
