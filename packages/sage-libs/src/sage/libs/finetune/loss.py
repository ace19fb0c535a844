"""Cross-entropy over completion tokens only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sage.libs.finetune.data.tokenizing import IGNORED


class CompletionLoss:
    """The Trainer's loss function; counts on the side what the progress events tell."""

    def __init__(self) -> None:
        self.trained_tokens = 0
        self.correct_tokens = 0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the summed loss of a micro-batch over the trained tokens of the whole optimizer step, in nats.

        outputs.logits: (samples, length, vocab).  labels: (samples, length), IGNORED where nothing is learnt.
        So each token of a step weighs the same, however the step is cut into micro-batches.
        """
        logits, targets = completion_logits(outputs.logits, labels)
        with torch.no_grad():
            self.trained_tokens += targets.numel()
            self.correct_tokens += int((logits.argmax(-1) == targets).sum())
        return functional.cross_entropy(logits, targets, reduction="sum") / (num_items_in_batch or targets.numel())

    def take_accuracy(self) -> float:
        """Return the share of trained tokens predicted rightly since the last call."""
        accuracy = self.correct_tokens / max(self.trained_tokens, 1)
        self.trained_tokens = self.correct_tokens = 0
        return accuracy


def completion_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (trained, vocab) logits in fp32 and the (trained,) tokens that they should predict."""
    targets = labels[:, 1:]
    trained = targets != IGNORED
    return logits[:, :-1][trained].float(), targets[trained]
