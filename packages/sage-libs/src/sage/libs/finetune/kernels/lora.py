"""Linear layers that share an input, with their LoRA adapters, as one matrix product.

PEFT's modules stay what they are: their parameters are read at every call and get their gradients. The frozen weights get
none, and their inputs are the only activations kept.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": y = W x + alpha / rank * B A x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sage.libs.finetune.kernels.int8 import Int8Matrix
from sage.libs.finetune.kernels.norm import remade, source_of
from sage.libs.finetune.kernels.product import product

#: By how much a product may move, as a share of its size, for its matrix to go to 8 bits. Those of SmolLM2 move by 1 to 3 %.
_INT8_TOLERANCE = 0.1


@dataclass(frozen=True)
class Adapter:
    """One adapter: which columns of the product it adds to, and which rows of the stacked A are its own."""

    columns: slice
    rows: slice
    scaling: float


@dataclass(frozen=True)
class Stacked:
    """The adapters of several layers as two matrices, in the numbers that the product is computed in."""

    adapters: list[Adapter]
    down: Tensor  #: (ranks, inputs): every A, one below the other
    up: Tensor  #: (outputs, ranks): every B, scaled, in its own block


class Projections:
    """Linear layers with one input; their weights become views of one matrix, so that nothing is held twice."""

    def __init__(self, layers: Sequence[nn.Module], compute_dtype: torch.dtype | None = None) -> None:
        """layers: each one that `is_fusible` accepts.  compute_dtype: of products; by default the weights'."""
        self._layers = tuple(layers)
        bases = [_base(layer) for layer in layers]
        self._widths = [base.out_features for base in bases]
        self.weight = bases[0].weight.data if len(bases) == 1 else torch.cat([base.weight.data for base in bases])
        self._share(self.weight)
        self._int8: Int8Matrix | None = None
        self._seen: list[Tensor] | None = None
        self.compute_dtype = compute_dtype or self.weight.dtype
        self.bias = None
        if any(base.bias is not None for base in bases):
            zeros = self.weight.new_zeros
            self.bias = torch.cat([zeros(base.out_features) if base.bias is None else base.bias.data for base in bases])

    def watch(self) -> None:
        """Keep the inputs that come, until `shrink`."""
        self._seen = []

    def shrink(self) -> float | None:
        """Hold the weights in 8 bits from now on, and in training multiply by them so; the layers' own become empty.

        Returns how far that moves the product with the inputs that were kept, as a share of its size; None where there were
        none, or it were too far: the weights stay as they are.
        """
        if not self._seen:
            return None
        inputs, self._seen = torch.cat(self._seen), None
        matrix = Int8Matrix(self.weight, inputs.abs().amax(0))
        wanted = inputs @ self.weight.to(self.compute_dtype).t()
        moved = float((matrix.forward(inputs) - wanted).norm() / wanted.norm())
        if not moved < _INT8_TOLERANCE:
            return None
        self._int8 = matrix
        self.put_away()
        return moved

    def put_away(self) -> None:
        """Leave the weights to the 8-bit matrix, where there is one; those of the layers become empty."""
        if self._int8:
            self.weight = self.weight.new_empty(0)
            for layer in self._layers:
                _base(layer).weight.data = self.weight

    def bring_back(self) -> None:
        """Give the layers weights again, as transformers needs them, until they are put away."""
        if self._int8:
            self._share(self._int8.whole(self.weight.dtype))

    def parameters(self) -> list[Tensor]:
        """Return A and B of each active adapter, in order."""
        return [matrix for _, a, b, _ in self._active() for matrix in (a, b)]

    def stack(self, parameters: Sequence[Tensor]) -> Stacked | None:
        """Return the adapters in one piece, None where there are none; parameters: those of `parameters()`."""
        if not parameters:
            return None
        down = torch.cat(list(parameters[0::2])).to(self.compute_dtype)
        up = down.new_zeros(sum(self._widths), down.shape[0])
        adapters, row = [], 0
        for (column, _, _, scaling), matrix in zip(self._active(), parameters[1::2], strict=True):
            width, rank = matrix.shape
            adapter = Adapter(slice(column, column + width), slice(row, row + rank), scaling)
            up[adapter.columns, adapter.rows] = matrix * scaling
            adapters.append(adapter)
            row += rank
        return Stacked(adapters, down, up)

    def forward(self, inputs: Tensor, stacked: Stacked | None) -> tuple[Tensor, Tensor | None]:
        """Return the product of (tokens, inputs) in the dtype of the weights, and what A made of them, (tokens, ranks)."""
        inputs = inputs.to(self.compute_dtype)
        if self._seen is not None:
            self._seen.append(inputs)
        if self._int8 and self._layers[0].training:
            outputs = self._int8.forward(inputs)
        else:
            weight = self._int8.whole(self.compute_dtype) if self._int8 else self.weight.to(self.compute_dtype)
            outputs = product(inputs, weight.t())
        if self.bias is not None:
            outputs += self.bias
        inner = None
        if stacked is not None:
            inner = inputs @ stacked.down.t()
            outputs.addmm_(inner, stacked.up.t())
        return outputs.to(self.weight.dtype), inner

    def backward(
        self,
        grad: Tensor,
        inputs: Tensor,
        stacked: Stacked | None,
        inner: Tensor | None,
        *,
        onto: Tensor | None = None,
        needs_inputs: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of inputs and of `parameters()`, from that of the (tokens, outputs) product.

        onto: a gradient of the same inputs, to which this one is added in place; both are in `compute_dtype`.
        """
        grad = grad.to(self.compute_dtype)
        grad_inputs = None
        if needs_inputs and self._int8:
            grad_inputs = self._int8.backward(grad, onto)
        elif needs_inputs:
            grad_inputs = product(grad, self.weight.to(self.compute_dtype), onto)
        if stacked is None or inner is None:
            return grad_inputs, []
        grad_inner = grad @ stacked.up
        if grad_inputs is not None:
            grad_inputs.addmm_(grad_inner, stacked.down)
        grad_down = grad_inner.to(inputs.dtype).t() @ inputs
        gradients = []
        for adapter in stacked.adapters:
            grad_up = grad[:, adapter.columns].t() @ inner[:, adapter.rows]
            gradients += [grad_down[adapter.rows], grad_up * adapter.scaling]
        return grad_inputs, gradients

    def _share(self, weight: Tensor) -> None:
        for layer, rows in zip(self._layers, weight.split(self._widths), strict=True):
            _base(layer).weight.data = rows

    def _active(self) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Yield the first column, A, B and scaling of each adapter that is switched on."""
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
        inputs = remade(ctx.saved_tensors)
        grad_inputs, gradients = ctx.projections.backward(
            grad, inputs, ctx.stacked, ctx.inner, needs_inputs=ctx.needs_input_grad[0]
        )
        return grad_inputs if grad_inputs is None else grad_inputs.to(inputs.dtype), None, None, *gradients


def project(inputs: Tensor, projections: Projections) -> Tensor:
    """Return the product of (…, inputs) with all layers, (tokens, outputs)."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return _Project.apply(flat, source_of(inputs), projections, *projections.parameters())


def is_fusible(layer: nn.Module) -> bool:
    """Return whether a layer is a frozen linear, plain or with LoRA adapters that do nothing but add B A x."""
    if isinstance(layer, LoraLinear):
        is_plain = not layer.lora_variant and not layer.merged and not any(layer.lora_bias.values())
        has_no_dropout = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        return is_plain and has_no_dropout and type(layer) is LoraLinear and is_fusible(layer.base_layer)
    return type(layer) is nn.Linear and not layer.weight.requires_grad


def _base(layer: nn.Module) -> nn.Linear:
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    assert isinstance(base, nn.Linear)
    return base
