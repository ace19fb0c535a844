"""One forward pass computes tokens of several adapters: each token uses the weights of its own adapter."""

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


class FlatModel(Model):
    """The same model. Its layers get the tokens without the batch dimension."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs[0])[None]  # type: ignore[no-any-return]


class Expert(Model):
    """The same model. Its layers get only every second token."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs[0, ::2])  # type: ignore[no-any-return]


def adapter_of(ranks: dict[str, int], seed: int) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    sizes = {"0": (WIDTH, 9), "1": (9, WIDTH)}
    return Adapter({
        name: (torch.randn(rank, sizes[name][0], generator=random), torch.randn(rank, sizes[name][1], generator=random))
        for name, rank in ranks.items()
    })  # fmt: skip


def alone(model: Model, adapter: Adapter | None, inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs of the model with one adapter, computed from the definition of LoRA."""
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


@pytest.mark.parametrize("kind", [Model, FlatModel])
@pytest.mark.parametrize("passes", [PASSES, PASSES[::-1]], ids=["growing", "shrinking"])
def test_each_token_uses_its_own_adapter_independent_of_earlier_passes(
    kind: type[Model], passes: list[list[tuple[int | None, int]]]
) -> None:
    model = kind()
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
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_an_adapter_whose_values_overflow_changes_no_other_answer() -> None:
    model, inputs = Model(), torch.ones(2, WIDTH)
    huge = Adapter({"0": (torch.full((1, WIDTH), 3e38), torch.ones(1, 9))})
    with torch.inference_mode():
        adapters = Adapters(model)
        for adapter in (huge, ADAPTERS[0]):
            adapters.hook(adapter)
        adapters.begin([huge, ADAPTERS[0]], [1, 1])
        found = model(inputs[None])[0]
        assert not found[0].isfinite().all()
        torch.testing.assert_close(found[1:], alone(model, ADAPTERS[0], inputs[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("owners", [[ADAPTERS[0]], [ADAPTERS[0], None]], ids=["alone", "mixed"])
def test_a_layer_that_sees_only_some_tokens_is_reported_by_its_name(owners: list[Adapter | None]) -> None:
    model = Expert()
    with torch.inference_mode():
        adapters = Adapters(model)
        adapters.hook(ADAPTERS[0])
        adapters.begin(owners, [2] * len(owners))
        with pytest.raises(NotImplementedError, match="layer 0 does not receive every token"):
            model(torch.randn(1, 2 * len(owners), WIDTH))


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
