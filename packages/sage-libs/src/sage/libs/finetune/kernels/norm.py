"""RMSNorm with a frozen weight.

The output of the norm is not saved. In the backward pass, layers that need the output recompute it from the norm's input.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Normed(NamedTuple):
    """The tensors that are needed to recompute the output of a norm. Layers save these tensors instead of the output."""

    inputs: Tensor
    scale: Tensor  #: reciprocal of the root mean square of each row, with the shape (…, 1)
    weight: Tensor

    def outputs(self) -> Tensor:
        """Return the output of the norm, bit-identical to the first computation."""
        return (self.inputs * self.scale).mul_(self.weight).to(self.inputs.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, normed: Normed) -> Tensor:
        ctx.save_for_backward(*normed)
        return normed.outputs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inputs, scale, weight = ctx.saved_tensors
        normed = inputs * scale
        grad = grad * weight
        projection = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(projection)).mul_(scale).to(inputs.dtype), None


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return inputs / rms(inputs) * weight over the last dimension, in the dtype of the inputs.

    weight: (hidden_size,), fp32 or fp64. The norm is computed in the weight's dtype; the weight receives no gradient.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    kept = inputs.detach()
    normed = Normed(kept, _inverse_rms(kept, eps), weight)
    outputs: Tensor = _RmsNorm.apply(inputs, normed)
    outputs.normed = normed
    return outputs


def saved(states: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that `recompute` needs: a `Normed` if `states` is an output of `rms_norm`, else `states`."""
    return getattr(states, "normed", (states.detach(),))


def recompute(source: Sequence[Tensor]) -> Tensor:
    """Return the states of the forward pass, reshaped to (rows, hidden_size).  source: the result of `saved(states)`."""
    states = Normed(*source).outputs() if len(source) > 1 else source[0]
    return states.reshape(-1, states.shape[-1])


def frozen_rms_norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """Return weight and eps if the module is a frozen RMSNorm of transformers, else None.

    Gemma stores weight - 1, so 1 is added to Gemma's weights.
    """
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if not kind.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.requires_grad:
        return None
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not isinstance(eps, float) or len(list(module.parameters())) != 1:
        return None
    wide = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide + 1 if kind.startswith("Gemma") else wide), eps


def _inverse_rms(inputs: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(inputs.dtype, torch.float32)
    norm = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(inputs.shape[-1]).add_(eps).rsqrt_()
