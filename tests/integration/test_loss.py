"""Batches and losses: the losses are compared with the losses that torch and transformers compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sage.libs.finetune.data.tokenizing import IGNORED, Encoded
from sage.libs.finetune.training.batching import PackedCollator, PaddedCollator, pack
from sage.libs.finetune.training.evaluation import heldout_loss
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.finetune.training.stopping import StopRequest, StopRequested

SEQUENCES = [
    Encoded([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]),
    Encoded([9, 10, 11, 12, 13, 14], [IGNORED, 10, 11, 12, 13, 14]),
    Encoded([15, 16, 17], [IGNORED, IGNORED, 17]),
]


PACKS = [(sequence,) for sequence in SEQUENCES]


def test_a_packed_batch_contains_the_samples_one_after_another() -> None:
    batch = PackedCollator()([tuple(SEQUENCES[:2]), tuple(SEQUENCES[2:])])
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 10, 13]
    assert batch["input_ids"].shape == (1, 64)
    assert batch["attention_mask"].sum() == 13
    assert batch["position_ids"][0, :13].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch["labels"][0, :13].tolist() == [
        IGNORED, IGNORED, 7, 8, IGNORED, 10, 11, 12, 13, 14, IGNORED, IGNORED, 17
    ]  # fmt: skip
    assert set(batch["labels"][0, 13:].tolist()) == {IGNORED}


def test_packs_are_almost_full_and_contain_each_sample_once() -> None:
    lengths = [1 + 37 * index % 50 for index in range(200)]
    packs = pack(lengths, 100, seed=1)
    tokens = [sum(lengths[index] for index in members) for members in packs]
    assert max(tokens) <= 100
    assert sum(tokens) / (100 * len(packs)) > 0.95
    assert sorted(index for members in packs for index in members) == list(range(200))
    assert packs == pack(lengths, 100, seed=1) != pack(lengths, 100, seed=2)
    assert pack([300], 100, seed=1) == [[0]]


def test_a_batch_is_padded_to_the_length_of_its_longest_sample() -> None:
    batch = PaddedCollator(pad_token_id=0)(PACKS)
    assert batch["input_ids"].shape == (3, 6)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6, 3]
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, 7, 8, IGNORED, IGNORED]


def test_the_loss_and_the_gradient_of_a_step_do_not_depend_on_its_micro_batches(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    total = sum(sequence.trained_tokens for sequence in SEQUENCES)

    def gradient(micro_batches: list[list[Encoded]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss, value = CompletionLoss(), 0.0
        for micro_batch in micro_batches:
            batch = PaddedCollator(0)([tuple(micro_batch)])
            labels = batch.pop("labels")
            part = loss(model(**batch), labels, total)
            part.backward()
            value += part.item()
        trained, correct = loss.take_counts()
        assert 0 <= correct <= trained
        return value, model.model.embed_tokens.weight.grad.clone()

    value, whole = gradient([SEQUENCES])
    cut_value, cut = gradient([SEQUENCES[:1], SEQUENCES[1:]])
    assert cut_value == pytest.approx(value, rel=1e-4)  # the loss is computed in fp32
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def test_the_held_out_loss_of_batches_equals_the_loss_of_single_samples(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    loss_sum, count = 0.0, 0
    for sequence in SEQUENCES:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, :-1]
        targets = torch.tensor(sequence.labels[1:])
        loss_sum += functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += sequence.trained_tokens
    measured = heldout_loss(model, SEQUENCES, PaddedCollator(0), CompletionLoss(), batch_size=2, on_batch=lambda: None)
    assert measured == pytest.approx(loss_sum / count, rel=1e-5)


class Stored(list[Encoded]):
    """Counts how often samples are read. `lengths` reads no sample."""

    reads = 0

    def lengths(self) -> list[int]:
        return [len(sequence.ids) for sequence in SEQUENCES]

    def __getitem__(self, at: Any) -> Any:
        self.reads += 1
        return super().__getitem__(at)


def test_held_out_samples_are_read_once(tiny_model: Path) -> None:
    stored, model = Stored(SEQUENCES), AutoModelForCausalLM.from_pretrained(tiny_model)
    heldout_loss(model, stored, PaddedCollator(0), CompletionLoss(), batch_size=2, on_batch=lambda: None)
    assert stored.reads == len(SEQUENCES)


def test_a_stop_interrupts_the_evaluation(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    stop = StopRequest()
    stop.request()
    with pytest.raises(StopRequested):
        heldout_loss(model, SEQUENCES, PaddedCollator(0), CompletionLoss(), batch_size=1, on_batch=stop.check)
    assert model.training
