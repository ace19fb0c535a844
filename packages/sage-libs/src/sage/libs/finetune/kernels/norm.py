"""Root mean square normalisation whose weight is frozen; only its input is kept."""

from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(inputs, eps)
        ctx.save_for_backward(inputs, weight, scale)
        return (inputs * scale).mul_(weight).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        inputs, weight, scale = ctx.saved_tensors
        normed = inputs * scale
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(inputs.dtype), None, None


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return inputs / rms(inputs) * weight over the last dimension, in the dtype of the inputs.

    weight: (width,), at least fp32, in which all is computed; it gets no gradient.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    return _RmsNorm.apply(inputs, weight, eps)


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
