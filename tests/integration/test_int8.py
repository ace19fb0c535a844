"""Int8 matrix products: the C code gives the same bits as torch, and a quantized base nearly the same gradients."""

from pathlib import Path

import pytest
import torch
from decoders import FAMILIES, LORA, gradients, samples, trainable
from torch import Tensor

from sage.libs.finetune.kernels import int8, native
from sage.libs.finetune.kernels.install import Kernels, install
from sage.libs.finetune.kernels.int8 import Int8Matrix, quantize, rescale
from sage.libs.finetune.kernels.lora import Projections

NO_COMPILER = native.library(int8._SOURCE)[1]
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_c_and_torch_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random(37, 100).to(dtype)[:, 3:80]
    numbers[5], numbers[6, 2] = 0, 1000
    factors = random(77, seed=1).abs()
    sums = torch.randint(-(10**6), 10**6, (37, 77), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    found = []
    for library in (native.library, lambda _: (None, "")):
        monkeypatch.setattr(int8, "library", library)
        integers, scales = quantize(numbers, factors)
        made = rescale(sums, scales, factors, torch.empty(37, 77, dtype=dtype))
        added = rescale(sums, scales, factors, made.clone(), adds=True)
        found.append((integers.clone(), scales, made, added))
    for in_c, in_torch in zip(*found, strict=True):
        assert torch.equal(in_c, in_torch)
    largest = found[0][0].abs().amax(1)
    assert largest[5] == 0
    assert (largest[largest > 0] == 127).all()


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_has_no_finite_output(
    wrong: float, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(int8, "library", lambda _: (None, ""))
    matrix, numbers = Int8Matrix(random(8, 16), torch.ones(16)), random(3, 16, seed=1)
    numbers[1, 4] = wrong
    made = matrix.forward(numbers)
    assert not made[1].isfinite().any()
    assert made[[0, 2]].isfinite().all()


def test_columns_with_large_values_do_not_increase_the_error_of_the_others() -> None:
    weight, inputs = random(48, 64), random(50, 64, seed=1)
    inputs[:, [3, 40]] *= 300
    weight[:, [3, 40]] /= 300
    weight[:, 7] = 0
    inputs[:, 9] = 0
    expected, grad = inputs @ weight.t(), random(50, 48, seed=2)

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    smooth, rough = (
        Int8Matrix(weight, activation_absmax) for activation_absmax in (inputs.abs().amax(0), weight.abs().amax(0))
    )
    assert error(smooth.dequantize(torch.float32), weight) < 0.01
    assert error(smooth.forward(inputs), expected) < 0.02
    assert error(rough.forward(inputs), expected) > 0.1
    assert error(smooth.backward(grad), grad @ weight) < 0.02
    onto = random(50, 64, seed=3)
    assert error(smooth.backward(grad, onto.clone()), onto + grad @ weight) < 0.02


def shrunk(family: str, dtype: torch.dtype = torch.float32, **lora: object) -> tuple[Kernels, dict[str, Tensor]]:
    model = trainable(FAMILIES[family](), dtype, **lora)
    kernels, summary = install(model.get_base_model(), int8=True)
    assert kernels, summary
    return kernels, gradients(model, [samples()], kernels)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_8_bits_gives_nearly_the_same_gradients(family: str) -> None:
    whole = gradients(trainable(FAMILIES[family](), torch.float32), [samples()], None)
    kernels, found = shrunk(family)
    assert kernels.int8_matrices == 10
    assert all(not layer.weight.numel() for name, layer in kernels.model.named_modules() if name.endswith("base_layer"))
    assert abs(found["loss"] - whole["loss"]) < 0.003 * whole["loss"]
    for name, grad in whole.items():
        if name != "loss":
            assert torch.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0) > 0.99, name


def test_in_evaluation_and_for_generation_only_the_weights_are_rounded() -> None:
    whole = trainable(FAMILIES["llama"](), torch.float32).eval()
    kernels, _ = shrunk("llama")
    kernels.model.eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        for _ in range(2):
            with kernels.disabled():
                moved = kernels.model(input_ids=ids).logits - expected
            assert 0 < moved.norm() / expected.norm() < 0.02


def test_a_layer_without_recorded_inputs_is_not_quantized_and_stops_recording() -> None:
    layer = torch.nn.Linear(4, 3)
    projections = Projections([layer])
    projections.record_inputs()
    assert projections.quantize() is None
    projections.forward(random(2, 4), None)
    assert projections.quantize() is None  # `quantize` has ended the recording
    assert layer.weight.numel() == 12


def test_layers_with_dropout_or_a_large_error_are_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shrunk("llama", **LORA["dropout"])[0].int8_matrices
    forward = Int8Matrix.forward
    # only gate and up have 112 rows
    monkeypatch.setattr(Int8Matrix, "forward", lambda self, x: forward(self, x) * (0.8 if len(self._scales) == 112 else 1))
    kernels, _ = shrunk("llama")
    assert kernels.int8_matrices == 6
    empty = {name for name, layer in kernels.model.named_modules() if not getattr(layer, "weight", torch.ones(1)).numel()}
    assert not any("gate" in name or "up" in name for name in empty)
    assert any("down" in name for name in empty)


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library.__wrapped__(int8._SOURCE) == (None, "there is no C compiler (cc)")


@needs_compiler
def test_c_code_is_compiled_once_and_a_failed_compilation_is_reported(
    sage_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = native.library.__wrapped__
    source = tmp_path / "broken.c"
    source.write_text("int half(")
    library, problem = compiled(source)
    assert library is None
    assert problem.startswith("broken.c cannot be compiled or loaded: ")
    source.write_text("int half(int whole) { return whole / 2; }")
    for _ in range(2):
        library, problem = compiled(source)
        assert library is not None, problem
        assert library.half(8) == 4
        assert len(list((sage_home / "cache" / "kernels").iterdir())) == 1
        monkeypatch.setattr(native, "_compile", None)
