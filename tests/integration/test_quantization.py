"""Bases that bitsandbytes holds in 8 or 4 bits; on the CPU they are slow, but they are the same code as on a GPU."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import HELDOUT, make_tiny_model
from training import TinyRun

from sage.libs.finetune.status import RunState

#: Where `make setup` puts bitsandbytes.
ASIDE = Path(sys.prefix) / "quantization"


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_learns_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ASIDE))
    make_tiny_model(tmp_path / "model", width=128)
    options = {"quantization": quantization, "eval_path": str(HELDOUT), "max_steps": 6}
    whole = TinyRun(tmp_path / "model", tmp_path / "whole", **options).start().completed()
    (started,) = whole.events("started")
    assert f"{quantization} base (bitsandbytes)" in started["precision"]
    assert started["kernels"].startswith("fast")
    assert (whole.status.heldout_loss or 99) < (whole.status.heldout_loss_before or 0)
    plain = TinyRun(tmp_path / "model", tmp_path / "plain", **options, fast_kernels="off").start().completed()
    assert plain.losses() == pytest.approx(whole.losses(), rel=1e-2)
    cut = TinyRun(tmp_path / "model", tmp_path / "cut", **options).start().at_step(2)
    cut.manager.stop(cut.task_id)
    assert cut.until_ended().state is RunState.STOPPED
    cut.manager.resume(cut.task_id)
    assert cut.completed().losses() == whole.losses()
    assert all("lora_" in name for name in load_file(whole.output / "adapter_model.safetensors"))


def test_without_bitsandbytes_a_quantised_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    status = TinyRun(tiny_model, tmp_path / "out", quantization="4bit").start().until_ended()
    assert status.code == "bitsandbytes_missing"
    assert "pip install" in str(status.hint)
