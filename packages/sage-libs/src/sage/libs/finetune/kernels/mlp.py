"""A gated feed-forward block as one autograd function. The product of gate and up is recomputed in the backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sage.libs.finetune.kernels.lora import Projections, is_fusible
from sage.libs.finetune.kernels.norm import recompute, saved


@dataclass(frozen=True)
class Activation:
    """An activation function with its backward function."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  #: (gradient of the output, input) -> gradient of the input


_SILU = Activation(nn.functional.silu, torch.ops.aten.silu_backward)
_GELU_TANH = Activation(
    lambda x: nn.functional.gelu(x, approximate="tanh"),
    lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
)
#: Supported activations. Keys: names of classes in transformers' ACT2FN.
_ACTIVATIONS = {"SiLU": _SILU, "SiLUActivation": _SILU, "GELUTanh": _GELU_TANH, "PytorchGELUTanh": _GELU_TANH}

MakeProjections: TypeAlias = Callable[[Sequence[nn.Module]], Projections]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        source: Sequence[Tensor],
        mlp: "GatedMlp",
        counts: tuple[int, int],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.mlp = mlp
        ctx.stacked = gate_stack, up_stack, down_stack = (
            mlp.gate.stack(parameters[: counts[0]]),
            mlp.up.stack(parameters[counts[0] : counts[1]]),
            mlp.down.stack(parameters[counts[1] :]),
        )
        gate, gate_inner = mlp.gate.forward(inputs, gate_stack)
        up, up_inner = mlp.up.forward(inputs, up_stack)
        outputs, down_inner = mlp.down.forward(mlp.activation.value(gate).mul_(up), down_stack)
        ctx.save_for_backward(gate, up, gate_inner, up_inner, down_inner, *source)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mlp, needs = ctx.mlp, ctx.needs_input_grad[0]
        gate_stack, up_stack, down_stack = ctx.stacked
        gate, up, gate_inner, up_inner, down_inner, *source = ctx.saved_tensors
        inputs = recompute(source)
        active = mlp.activation.value(gate)
        grad_hidden, grads_down = mlp.down.backward(grad, active * up, down_stack, down_inner)
        grad_hidden = grad_hidden.to(gate.dtype)
        grad_inputs, grads_up = mlp.up.backward(active.mul_(grad_hidden), inputs, up_stack, up_inner, needs_inputs=needs)
        grad_gate = mlp.activation.backward(grad_hidden.mul_(up), gate)
        grad_inputs, grads_gate = mlp.gate.backward(
            grad_gate, inputs, gate_stack, gate_inner, onto=grad_inputs, needs_inputs=needs
        )
        grad_inputs = grad_inputs if grad_inputs is None else grad_inputs.to(inputs.dtype)
        return grad_inputs, None, None, None, *grads_gate, *grads_up, *grads_down


class GatedMlp:
    """Computes down(activation(gate(x)) * up(x)); each of the three layers includes its adapters."""

    def __init__(self, layers: Sequence[nn.Module], activation: Activation, make: MakeProjections) -> None:
        """layers: gate, up and down.  make: a function that creates the Projections of a list of layers."""
        self.gate, self.up, self.down = (make([layer]) for layer in layers)
        self.activation = activation

    @classmethod
    def of(cls, module: nn.Module, make: MakeProjections = Projections) -> "GatedMlp | None":
        """Return a GatedMlp that replaces a module of transformers, or None if the module's structure is not supported."""
        names = {name for name, _ in module.named_children()}
        if names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        layers = [module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        activation = _ACTIVATIONS.get(type(module.act_fn).__name__)
        if activation is None or not all(map(is_fusible, layers)):
            return None
        return cls(layers, activation, make)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the output of the block. The inputs and the output have the shape (…, hidden_size)."""
        gate, up, down = (part.parameters() for part in (self.gate, self.up, self.down))
        flat = inputs.reshape(-1, inputs.shape[-1])
        counts = len(gate), len(gate) + len(up)
        outputs: Tensor = _GatedMlp.apply(flat, saved(inputs), self, counts, *gate, *up, *down)
        return outputs.view(*inputs.shape[:-1], -1)
