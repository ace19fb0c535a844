"""Micro-batches: samples padded to the longest among them and no further."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sage.libs.finetune.data.tokenizing import IGNORED, Encoded


@dataclass(frozen=True)
class Collator:
    """Turns encoded sequences into the tensors of a causal language model."""

    pad_token_id: int

    def __call__(self, sequences: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, each (samples, longest), int64.

        The first label of a row is IGNORED: nothing predicts the first token.
        """
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
