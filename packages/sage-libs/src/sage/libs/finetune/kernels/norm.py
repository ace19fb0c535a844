"""Root mean square normalisation whose weight is frozen; only its input is kept, also by what takes its output."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Normed(NamedTuple):
    """What the output of a norm is made from again, so that nobody needs to keep it."""

    inputs: Tensor
    scale: Tensor  #: (…, 1): one over the root mean square of each row
    weight: Tensor

    def outputs(self) -> Tensor:
        """Return the norm's output, to the last bit."""
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
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(inputs.dtype), None


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return inputs / rms(inputs) * weight over the last dimension, in the dtype of the inputs.

    weight: (width,), at least fp32, in which all is computed; it gets no gradient.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    kept = inputs.detach()
    normed = Normed(kept, _inverse_rms(kept, eps), weight)
    outputs: Tensor = _RmsNorm.apply(inputs, normed)
    outputs.normed = normed
    return outputs


def source_of(states: Tensor) -> tuple[Tensor, ...]:
    """Return what to keep of states for `remade`: where they are, as they came, the output of `rms_norm`, its source."""
    return getattr(states, "normed", (states.detach(),))


def remade(source: Sequence[Tensor]) -> Tensor:
    """Return the states of which `source_of` is given, to the last bit, as (rows, width)."""
    states = Normed(*source).outputs() if len(source) > 1 else source[0]
    return states.reshape(-1, states.shape[-1])


def norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """Return weight and eps of a frozen RMSNorm of transformers', or None where a module is none that is known.

    Gemma's weights count from one.
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
