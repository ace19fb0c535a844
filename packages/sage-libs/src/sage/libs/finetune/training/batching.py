"""Build micro-batches from samples.

If SAGE's kernels are used, the samples are packed into one sequence. Otherwise, each sample is padded to the length of the
longest sample.
"""

import bisect
import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sage.libs.finetune.data.tokenizing import IGNORED, Encoded

#: Samples that are always in the same micro-batch. A pack is one item of the Trainer's dataset.
Pack = tuple[Encoded, ...]
Batch = dict[str, Tensor]
#: A packed micro-batch is padded to a multiple of this many tokens.
_TOKENS_STEP = 64


@dataclass(frozen=True)
class PackedCollator:
    """Concatenates samples into one sequence for the kernels, with at most 63 tokens of padding at the end.

    The padding limits the number of different lengths. For each new length, oneDNN compiles a matrix product; each
    compilation takes 3 ms and 1 MB of memory.
    """

    def __call__(self, packs: Sequence[Pack]) -> Batch:
        """Return int64 tensors: input_ids, position_ids, attention_mask, labels and cu_seq_lens_q.

        The shape of cu_seq_lens_q is (samples + 1,). The shape of each other tensor is (1, tokens + padding).
        cu_seq_lens_q: index of the first token of each sample, followed by the number of tokens without padding.
        """
        sequences = list(_flat(packs))
        lengths = torch.tensor([0, *(len(sequence.ids) for sequence in sequences)])
        bounds = lengths.cumsum(0)
        tokens = int(bounds[-1])
        shape = (1, -(-tokens // _TOKENS_STEP) * _TOKENS_STEP)
        ids, positions, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        labels = torch.full(shape, IGNORED)
        ids[0, :tokens] = torch.tensor([token for sequence in sequences for token in sequence.ids])
        positions[0, :tokens] = torch.cat([torch.arange(length) for length in lengths[1:].tolist()])
        mask[0, :tokens] = 1
        labels[0, :tokens] = torch.tensor([label for s in sequences for label in (IGNORED, *s.labels[1:])])
        return {
            "input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels, "cu_seq_lens_q": bounds
        }  # fmt: skip


@dataclass(frozen=True)
class PaddedCollator:
    """Puts each sample in its own row, padded to the length of the longest sample. This works with every model."""

    pad_token_id: int

    def __call__(self, packs: Sequence[Pack]) -> Batch:
        """Return int64 tensors of shape (samples, length of the longest sample): input_ids, attention_mask and labels.

        The first label of a row is IGNORED, because the first token is never predicted.
        """
        sequences = list(_flat(packs))
        shape = (len(sequences), max(len(sequence.ids) for sequence in sequences))
        ids = torch.full(shape, self.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids)
            ids[row, :length] = torch.tensor(sequence.ids)
            mask[row, :length] = 1
            labels[row, 1:length] = torch.tensor(sequence.labels[1:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


Collator = PackedCollator | PaddedCollator


def cut(batch: Batch, times: int) -> list[Batch]:
    """Cut a micro-batch into at most 2 ** `times` micro-batches by repeated halving. The order of the samples is kept."""
    samples = samples_in(batch)
    if not times or samples == 1:
        return [batch]
    parts = _packed_halves(batch) if "cu_seq_lens_q" in batch else _padded_halves(batch, samples // 2)
    return [smaller for part in parts for smaller in cut(part, times - 1)]


def samples_in(batch: Batch) -> int:
    """Return the number of samples in a micro-batch."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def _packed_halves(batch: Batch) -> Iterator[Batch]:
    """Yield the two halves of a packed micro-batch, cut at the sample boundary nearest to the middle."""
    bounds = batch["cu_seq_lens_q"]
    at = 1 + int((bounds[1:-1] - bounds[-1] / 2).abs().argmin())
    for own in (bounds[: at + 1], bounds[at:]):
        begin, end = int(own[0]), int(own[-1])
        fill = (0, (begin - end) % _TOKENS_STEP)
        part = {
            key: functional.pad(value[:, begin:end], fill, value=IGNORED if key == "labels" else 0)
            for key, value in batch.items()
            if key != "cu_seq_lens_q"
        }
        yield {**part, "cu_seq_lens_q": own - begin}


def _padded_halves(batch: Batch, at: int) -> Iterator[Batch]:
    for rows in (slice(at), slice(at, None)):
        longest = int(batch["attention_mask"][rows].sum(-1).max())
        yield {key: value[rows, :longest] for key, value in batch.items()}


class Packs(Sequence[Pack]):
    """A sequence of packs. Each access to a pack reads its samples again."""

    def __init__(self, samples: Sequence[Encoded], groups: Sequence[Sequence[int]] | None = None) -> None:
        """groups: indexes of the samples of each pack; None: one sample per pack."""
        self._samples, self._groups = samples, groups

    def __len__(self) -> int:
        return len(self._samples if self._groups is None else self._groups)

    def __getitem__(self, at: Any) -> Any:
        return tuple(self._samples[index] for index in ((at,) if self._groups is None else self._groups[at]))


def largest_packs(lengths: Sequence[int], groups: Sequence[Sequence[int]] | None, micro_batch: int) -> list[int]:
    """Return the indexes of the packs in the largest possible micro-batch.

    groups: sample indexes of each pack; None: one sample per pack.  micro_batch: number of packs per micro-batch.
    """
    sums = lengths if groups is None else [sum(lengths[index] for index in group) for group in groups]
    return heapq.nlargest(micro_batch, range(len(sums)), key=sums.__getitem__)


def pack(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Group samples into packs of at most `tokens` tokens; return the sample indexes of each pack.

    A sample longer than `tokens` gets its own pack.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - reproducible, no secret
    packs: list[list[int]] = []
    rooms: list[int] = []  # the different numbers of free tokens in packs, ascending
    by_room: dict[int, list[int]] = {}  # indexes of packs, by number of free tokens
    for index in order:
        length = lengths[index]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            packs.append([])
            room, chosen = tokens, len(packs) - 1
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packs[chosen].append(index)
        if (left := room - length) > 0:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(chosen)
    return packs


def _flat(packs: Iterable[Pack]) -> Iterator[Encoded]:
    for members in packs:
        yield from members
