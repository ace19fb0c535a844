"""Compute the held-out loss: the mean loss over all completion tokens of the held-out samples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sage.libs.finetune.data.tokenizing import Encoded
from sage.libs.finetune.training.batching import Collator
from sage.libs.finetune.training.loss import CompletionLoss


def heldout_loss(
    model: Any,
    sequences: Sequence[Encoded],
    collator: Collator,
    loss: CompletionLoss,
    batch_size: int,
    on_batch: Callable[[], None],
) -> float:
    """Return the mean loss per completion token in nats, computed in the model's precision.

    on_batch: called before each batch; if it raises an exception, the evaluation ends.
    """
    was_training = model.training
    model.eval()
    loss_sum, token_count = 0.0, 0
    stored = getattr(sequences, "lengths", None)  # the lengths of StoredSamples are known without reading the samples
    lengths = stored() if stored else [len(sequence.ids) for sequence in sequences]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                on_batch()
                packs = [(sequences[index],) for index in order[start : start + batch_size]]
                batch = {key: value.to(model.device) for key, value in collator(packs).items()}
                labels = batch.pop("labels")
                loss_sum += float(loss(model(**batch, use_cache=False), labels, 1))
                token_count += sum(sequence.trained_tokens for (sequence,) in packs)
        loss.take_counts()
    finally:
        model.train(was_training)
    return loss_sum / token_count
