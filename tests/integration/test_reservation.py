"""A training run with less reserved memory than it needs."""

from dataclasses import replace
from pathlib import Path

import pytest
from training import TinyRun

from sage.libs.finetune.run.estimate import FRAMEWORK_BYTES, Formats, TrainingMemory
from sage.libs.finetune.run.reservation import RESERVED_VARIABLE
from sage.libs.models.architecture import read_architecture


def test_a_run_with_too_little_reserved_memory_splits_its_micro_batches_and_has_the_same_losses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 2, "gradient_checkpointing": "off"}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    sizes = read_architecture(tiny_model)
    assert sizes
    needs = TrainingMemory(replace(sizes, file_bytes=0), whole.config, Formats(), has_kernels=True)
    monkeypatch.setenv(RESERVED_VARIABLE, str(needs.at([64]).total_bytes))
    assert needs.framework_bytes == FRAMEWORK_BYTES
    reduced = TinyRun(tiny_model, tmp_path / "reduced", **options).trained()
    assert (reduced.status.halvings, whole.status.halvings) == (2, 0)
    assert "micro-batches are computed in up to 4 parts. The optimizer steps do not change." in reduced.status.warnings[0]
    assert reduced.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_a_run_that_used_more_than_its_reservation_reports_both_numbers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESERVED_VARIABLE, "150000000")
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1).trained()
    assert any("GB of memory, but only 0.1 GB are reserved" in warning for warning in run.status.warnings)
