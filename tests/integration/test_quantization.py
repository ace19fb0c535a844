"""Base models that bitsandbytes quantizes to 8 or 4 bits. On the CPU they are slow, but run the same code as on a GPU."""

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import HELDOUT, make_tiny_model
from training import TinyRun


def learnt(tmp_path: Path, quantization: str, **options: Any) -> TinyRun:
    """Train a model that is wide enough to be quantized."""
    if not (tmp_path / "model").exists():
        make_tiny_model(tmp_path / "model", width=128)
    more = {"quantization": quantization, "eval_path": str(HELDOUT), "max_steps": 6, **options}
    run = TinyRun(tmp_path / "model", tmp_path / f"out-{len(more)}", **more).start().completed()
    assert f"{quantization} base (bitsandbytes)" in run.events("started")[0]["precision"]
    assert (run.status.heldout_loss or 99) < (run.status.heldout_loss_before or 0)
    assert all("lora_" in name for name in load_file(run.output / "adapter_model.safetensors"))
    return run


@pytest.mark.parametrize("quantization", ["8bit", pytest.param("4bit", marks=pytest.mark.long)])
def test_a_quantized_base_is_trained_with_the_fast_kernels(tmp_path: Path, quantization: str) -> None:
    fast = learnt(tmp_path, quantization)
    assert fast.events("started")[0]["kernels"].startswith("fast")
    if quantization == "4bit":
        plain = learnt(tmp_path, quantization, fast_kernels="off")
        assert plain.losses() == pytest.approx(fast.losses(), rel=1e-2)


def test_without_bitsandbytes_a_quantized_base_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No bitsandbytes is installed below this prefix.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.prefix = {str(tmp_path)!r}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    status = TinyRun(tiny_model, tmp_path / "out", quantization="4bit").start().until_ended()
    assert status.code == "bitsandbytes_missing"
    assert "pip install" in str(status.hint)
