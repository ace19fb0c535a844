"""Tokens of several adapters in one pass: each goes through the weights of its own."""

import weakref

import pytest
import torch
from torch import nn

from sage.llm.workers.adapters import Adapter, Adapters

WIDTH = 12


class Model(nn.Sequential):
    """Two linear layers."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH))


def adapter_of(ranks: dict[str, int], seed: int) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    sizes = {"0": (WIDTH, 9), "1": (9, WIDTH)}
    return Adapter({
        name: (torch.randn(rank, sizes[name][0], generator=random), torch.randn(rank, sizes[name][1], generator=random))
        for name, rank in ranks.items()
    })  # fmt: skip


def alone(model: Model, adapter: Adapter | None, inputs: torch.Tensor) -> torch.Tensor:
    """Return what the adapter's definition gives, layer by layer."""
    for name, layer in model.named_children():
        outputs = nn.functional.linear(inputs, layer.weight, layer.bias)
        if adapter and name in adapter.weights:
            down, up = adapter.weights[name]
            outputs = outputs + inputs @ down.T @ up
        inputs = outputs
    return inputs


ADAPTERS = [
    adapter_of({"0": 3, "1": 3}, 1),
    adapter_of({"0": 1}, 2),
    adapter_of({"1": 4}, 3),
    adapter_of({"0": 2, "1": 5}, 4),
]
PASSES: list[list[tuple[int | None, int]]] = [
    [(None, 3)], [(0, 2)], [(0, 1), (None, 2)], [(1, 2), (0, 3)], [(0, 1), (1, 1), (2, 2), (3, 1), (None, 1), (0, 2)],
    [(2, 1), (2, 3)], [(None, 1)], [(3, 1)], [(1, 1), (2, 1)],
]  # fmt: skip


@pytest.mark.parametrize("passes", [PASSES, PASSES[::-1]], ids=["growing", "shrinking"])
def test_each_token_goes_through_its_own_adapter_whatever_was_run_before(passes: list[list[tuple[int | None, int]]]) -> None:
    model = Model()
    with torch.inference_mode():
        adapters = Adapters(model)
        for adapter in ADAPTERS:
            adapters.hook(adapter)
        for parts in passes:
            owners = [None if at is None else ADAPTERS[at] for at, _ in parts]
            inputs = [torch.randn(length, WIDTH) for _, length in parts]
            adapters.begin(owners, [length for _, length in parts])
            found = model(torch.cat(inputs)[None])[0]
            expected = torch.cat([alone(model, owner, own) for owner, own in zip(owners, inputs, strict=True)])
            torch.testing.assert_close(found, expected)


def test_an_adapter_that_is_forgotten_is_not_kept_in_memory() -> None:
    adapters = Adapters(Model())
    adapter = adapter_of({"0": 2}, 5)
    adapters.hook(adapter)
    adapters.begin([adapter], [1])
    remains = weakref.ref(adapter)
    adapters.forget(adapter)
    adapters.begin([None], [1])
    del adapter
    assert remains() is None
