"""Cross-entropy over completion tokens only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sage.libs.finetune.data.tokenizing import IGNORED
from sage.libs.finetune.kernels.product import lm_head_backward, lm_head_logits

#: Number of tokens per chunk; only the logits of one chunk are in memory.
_CHUNK = 384
#: Chunks are padded to a multiple of this many rows, because oneDNN compiles a matrix product for each new size.
_ROWS_STEP = 64
#: Minimum log probability, used instead of -inf if a probability is rounded to zero.
_MIN_LOG_PROB = -100.0


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, lm_head: Tensor, targets: Tensor, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total, correct = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            count = len(targets[rows])
            states = functional.pad(hidden[rows], (0, 0, 0, -count % _ROWS_STEP))
            # On a GPU, fp32 is as fast as bf16 here, and more exact.
            probs = lm_head_logits(states, lm_head, compute_dtype).softmax(-1, dtype=wide if hidden.is_cuda else None)
            targeted = torch.arange(count, device=targets.device), targets[rows]
            target_probs = probs[targeted]
            correct += (target_probs >= _row_max(probs[:count])).sum()
            total -= target_probs.to(wide).log().clamp_min(_MIN_LOG_PROB).sum()
            if grad is not None:
                probs[targeted] -= 1
                grad[rows] = lm_head_backward(probs.to(hidden.dtype), lm_head, compute_dtype)[:count]
            del probs  # free the memory before the logits of the next chunk are computed
        ctx.grad = grad
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.grad * grad.to(ctx.grad.dtype), None, None, None


def _row_max(probs: Tensor) -> Tensor:
    """Return the largest probability of each row.

    Probabilities are compared as integers with the same bits: their order is the same, and integers are compared faster.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[probs.element_size()]
    return probs.view(integers).amax(-1).view(probs.dtype)


def completion_loss(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of completion tokens in nats, and the number of correctly predicted tokens.

    hidden: (tokens, hidden_size), trained positions only. lm_head: (vocab, hidden_size), frozen. targets: (tokens,), int64.
    compute_dtype: dtype of matrix products; default: the dtype of `hidden`.
    The gradient is computed chunk by chunk in the forward pass, so at most 384 * vocab logits are in memory.
    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 3, here in plain torch.
    """
    return _ChunkedLoss.apply(hidden, lm_head, targets, compute_dtype or hidden.dtype)


class CompletionLoss:
    """The Trainer's loss function, which also counts trained and correctly predicted tokens for the progress events."""

    def __init__(self, lm_head: Tensor | None = None, compute_dtype: torch.dtype | None = None) -> None:
        """lm_head: (vocab, hidden_size) if the model returns hidden states as `logits`. None if the model returns logits.

        compute_dtype: dtype of products with lm_head; default: the dtype of the hidden states.
        """
        self._lm_head, self._compute_dtype = lm_head, compute_dtype
        self.counts = 0, 0  #: trained tokens and correctly predicted tokens since the last `take_counts`

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the summed loss of a micro-batch in nats, divided by the number of trained tokens in the optimizer step.

        outputs.logits: (samples, length, vocab or hidden_size).  labels: (samples, length), IGNORED for untrained tokens.
        Each trained token of a step has the same weight, even if the micro-batches of the step have different sizes.
        """
        targets = labels[:, 1:]
        trained = targets != IGNORED
        states, targets = outputs.logits[:, :-1][trained], targets[trained]
        if self._lm_head is None:
            loss = functional.cross_entropy(states.float(), targets, reduction="sum")
            correct = (states.detach().argmax(-1) == targets).sum()
        else:
            loss, correct = completion_loss(states, self._lm_head, targets, self._compute_dtype)
        self.counts = self.counts[0] + targets.numel(), self.counts[1] + int(correct)
        return loss / (num_items_in_batch or targets.numel())

    def take_counts(self) -> list[int]:
        """Return the counts and reset them to zero."""
        counts, self.counts = self.counts, (0, 0)
        return [*counts]
