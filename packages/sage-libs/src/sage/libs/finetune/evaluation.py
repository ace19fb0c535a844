"""Held-out loss: the mean over all completion tokens, each weighing the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from sage.libs.finetune.batching import Collator
from sage.libs.finetune.data.tokenizing import Encoded
from sage.libs.finetune.loss import completion_logits


def heldout_loss(
    model: Any, sequences: Sequence[Encoded], collator: Collator, batch_size: int, on_batch: Callable[[], None]
) -> float:
    """Return the mean completion loss of a model over sequences, in nats per token, in the model's own precision.

    `on_batch` is called before each batch; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    loss_sum, token_count = 0.0, 0
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    try:
        with torch.inference_mode():
            for start in range(0, len(ordered), batch_size):
                on_batch()
                batch = {k: v.to(model.device) for k, v in collator(ordered[start : start + batch_size]).items()}
                labels = batch.pop("labels")
                logits, targets = completion_logits(model(**batch, use_cache=False).logits, labels)
                loss_sum += functional.cross_entropy(logits, targets, reduction="sum").item()
                token_count += targets.numel()
    finally:
        model.train(was_training)
    return loss_sum / token_count
