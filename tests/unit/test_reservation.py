"""A run uses only the memory that the control plane reserved for it."""

from dataclasses import replace
from typing import Any

import pytest

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import Formats, TrainingMemory
from sage.libs.finetune.run.reservation import RESERVED_VARIABLE, reserved_bytes
from sage.libs.finetune.training.planning import MemoryPlan
from sage.libs.finetune.training.precision import Precision
from sage.libs.models.architecture import Architecture

BF16 = Precision(True, True, None, False, "", "")
FP32 = replace(BF16, bf16=False, bf16_products=False)
SHAPES = {"embed_tokens": (100, 8), "layers.0.up_proj": (24, 8), "layers.0.down_proj": (8, 24)}


def plan(allowed_bytes: int, **options: Any) -> MemoryPlan:
    """Return the plan of a run that trains a small model and may use `allowed_bytes`."""
    needs, free_bytes = memory(**options), 10**12
    return MemoryPlan(FP32, needs, free_bytes, None, allowed_bytes)


def memory(**options: Any) -> TrainingMemory:
    sizes = Architecture(SHAPES, 0, 8, 1, 2, 1, 4, 24, 512)
    values = {"base_model": "m", "dataset_path": "d.jsonl", "output_dir": "out", "lora_rank": 2, **options}
    return TrainingMemory(sizes, FinetuneConfig.model_validate(values), Formats(), has_kernels=True, framework_bytes=0)


def test_a_run_that_fits_into_its_reservation_is_not_changed() -> None:
    batch = {64: 8}
    assert plan(memory().at(batch).total_bytes).reduction(batch) is None
    assert plan(0).reduction({}) is None


@pytest.mark.parametrize(("fitting", "halvings"), [(8, 1), (7, 2), (4, 2), (3, 3), (1, 4)])
def test_a_micro_batch_is_cut_until_its_parts_fit_into_the_reservation(fitting: int, halvings: int) -> None:
    reduction = plan(memory().at({64: fitting}).total_bytes).reduction({64: 16})
    assert reduction
    assert (reduction.halvings, reduction.checkpointing) == (halvings, False)
    assert reduction.estimate == memory().at({64: fitting})
    assert f"in up to {2**halvings} parts" in reduction.message


@pytest.mark.parametrize(("option", "is_used"), [("auto", True), ("off", False)])
def test_activations_are_recomputed_if_not_even_one_sample_fits(option: str, is_used: bool) -> None:
    reduction = plan(memory().at({64: 1}).total_bytes - 1, gradient_checkpointing=option).reduction({64: 4, 10: 1})
    assert reduction
    assert (reduction.halvings, reduction.checkpointing) == (3, is_used)
    assert ("gradient checkpointing" in reduction.message) == is_used


def test_a_run_takes_the_smaller_precision_if_its_reservation_requires_it() -> None:
    batch = {64: 8}
    needed_bytes = memory().at(batch).total_bytes
    assert replace(plan(needed_bytes), smaller=BF16).fitted(batch).precision is FP32
    assert replace(plan(needed_bytes - 1), smaller=BF16).fitted(batch).precision is BF16


@pytest.mark.parametrize(("value", "found"), [("1500000000", 1_500_000_000), ("", None), ("1.5", None)])
def test_the_reservation_is_an_environment_variable_of_the_worker(
    value: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESERVED_VARIABLE, value)
    assert reserved_bytes() == found
