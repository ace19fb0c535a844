"""The gradients of a training step on a GPU, compared with those on a CPU."""

import pytest
import torch
from decoders import FAMILIES, distance, gradients, samples, trainable
from torch import Tensor

from sage.libs.finetune.kernels.install import install
from sage.libs.finetune.training.batching import PackedCollator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def on_gpu(family: str, dtype: torch.dtype, *, fast: bool) -> dict[str, Tensor]:
    model = trainable(FAMILIES[family](), torch.float32).to("cuda", dtype)
    kernels, summary = install(model.get_base_model()) if fast else (None, "")
    assert bool(kernels) == fast, summary
    return gradients(model, [samples()], kernels)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_on_a_gpu_equal_those_on_a_cpu(family: str) -> None:
    truth = gradients(trainable(FAMILIES[family](), torch.float32), [samples()], None)
    found = on_gpu(family, torch.float32, fast=True)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_training_step_follows_an_evaluation_of_the_same_samples() -> None:
    model = trainable(FAMILIES["llama"](), torch.float32).to("cuda", torch.bfloat16)
    kernels, summary = install(model.get_base_model())
    assert kernels, summary
    with torch.inference_mode():
        batch = PackedCollator()([samples()])
        batch.pop("labels")
        model(**{name: tensor.to("cuda") for name, tensor in batch.items()}, use_cache=False)
    assert gradients(model, [samples()], kernels)["loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_gradients_in_bf16_is_not_much_larger_than_without_kernels(family: str) -> None:
    truth = gradients(trainable(FAMILIES[family](), torch.float32).double(), [samples()], None)
    fast, plain = on_gpu(family, torch.bfloat16, fast=True), on_gpu(family, torch.bfloat16, fast=False)
    assert distance(fast, truth) < 1.2 * distance(plain, truth)  # rounding errors are random
    assert abs(fast["loss"] - truth["loss"]) < 0.01 * truth["loss"]
