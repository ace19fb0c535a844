"""Apply several LoRA adapters in one forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

#: Key: name of a linear layer. Value: LoRA's A, (rank, in_features), and LoRA's B, transposed to (rank, out_features).
#: One of the two matrices is already multiplied by the adapter's scaling factor.
Weights = dict[str, tuple[Tensor, Tensor]]


class Adapter:
    """The weights of an adapter."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights


class _Stack:
    """The stacked weights of several adapters, so that two matrix products per layer are enough for all adapters.

    The matrices A of all adapters are stacked. Their product with the inputs has a group of columns for each adapter. For
    each token, the columns of the adapters that the token does not use are set to 0. These columns then add nothing in the
    product with all matrices B. The weights must be finite, because 0 * infinity is not 0.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        #: key: layer name; value: the matrices A of all adapters, the matrices B of all adapters, the rank of each adapter
        self.layers: dict[str, tuple[Tensor, Tensor, tuple[int, ...]]] = {}
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.weights):
            having = [adapter.weights[name] for adapter in adapters if name in adapter.weights]
            ranks = tuple(len(adapter.weights[name][0]) if name in adapter.weights else 0 for adapter in adapters)
            downs, ups = [down for down, _ in having], [up for _, up in having]
            self.layers[name] = _joined(downs), _joined(ups), ranks


class Adapters:
    """Adds the outputs of adapters to the outputs of the base model's linear layers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._stack = _Stack(())
        self._owners = torch.empty(0)  #: (tokens,): index of each token's adapter in the stack; -1: no adapter
        self._is_mixed = False
        self._is_on = False
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def hook(self, adapter: Adapter) -> None:
        """Register hooks on the layers that an adapter changes."""
        for name in adapter.weights.keys() - self._hooked:
            self._model.get_submodule(name).register_forward_hook(
                lambda _module, inputs, output, name=name: self._add(name, inputs[0], output)
            )
            self._hooked.add(name)

    def forget(self, adapter: Adapter) -> None:
        """Free the memory of an adapter. The caller must ensure that no answer uses the adapter."""
        if adapter in self._stack.adapters:
            self._stack = _Stack(())

    def begin(self, adapters: Sequence[Adapter | None], lengths: Sequence[int]) -> None:
        """Set the adapters of the next forward pass.

        The first lengths[0] tokens of the pass use adapters[0], the next lengths[1] tokens use adapters[1], and so on.
        """
        needed = dict.fromkeys(adapter for adapter in adapters if adapter)
        self._is_on = bool(needed)
        if not needed:
            return
        kept = self._stack.adapters
        if not needed.keys() <= set(kept) or len(kept) > 2 * len(needed):
            others = [adapter for adapter in kept if adapter not in needed]
            self._stack = _Stack([*needed, *others[: len(needed)]] if len(needed) > 1 else list(needed))
        places = {adapter: at for at, adapter in enumerate(self._stack.adapters)}
        owners = [-1 if adapter is None else places[adapter] for adapter in adapters]
        self._is_mixed = len(self._stack.adapters) > 1 or -1 in owners
        self._owners = torch.tensor(owners).repeat_interleave(torch.tensor(lengths)).to(self._model.device)
        self._masks = {}

    def _add(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Add the adapters' output to a layer's output in place.  inputs: (..., in_features).  output: (..., out_features).

        Raises NotImplementedError if the layer does not receive all tokens of the forward pass.
        """
        if not self._is_on or name not in self._stack.layers:
            return
        down, up, ranks = self._stack.layers[name]
        inner = linear(inputs.flatten(end_dim=-2), down)
        if len(inner) != len(self._owners):
            raise NotImplementedError(f"the layer {name} does not receive every token")
        if self._is_mixed:
            inner.masked_fill_(self._mask(ranks), 0)
        output.view(-1, output.shape[-1]).addmm_(inner, up)

    def _mask(self, ranks: tuple[int, ...]) -> Tensor:
        """Return a bool mask, (tokens, sum of the ranks): True if the column's adapter is not the token's adapter."""
        if ranks not in self._masks:
            columns = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(self._owners.device)
            self._masks[ranks] = columns[None] != self._owners[:, None]
        return self._masks[ranks]


def _joined(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)
