"""Cross-entropy over completion tokens only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sage.libs.finetune.data.tokenizing import IGNORED
from sage.libs.finetune.kernels.product import from_vocabulary, to_vocabulary

#: Tokens whose logits are held at once.
_CHUNK = 384
#: Matrix products are compiled for each size that they meet, so a chunk has a multiple of this many rows.
_ROWS_STEP = 64
#: A probability that is zero in the numbers used counts as e to the power of this.
_LEAST_LOG = -100.0


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total, correct = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            count = len(targets[rows])
            states = functional.pad(hidden[rows], (0, 0, 0, -count % _ROWS_STEP))
            shares = to_vocabulary(states, head, compute_dtype).softmax(-1)
            aims = torch.arange(count, device=targets.device), targets[rows]
            said = shares[aims]
            correct += (said >= _largest(shares[:count])).sum()
            total -= said.to(wide).log().clamp_min(_LEAST_LOG).sum()
            if grad is not None:
                shares[aims] -= 1
                grad[rows] = from_vocabulary(shares, head, compute_dtype)[:count]
        ctx.grad = grad
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.grad * grad.to(ctx.grad.dtype), None, None, None


def _largest(shares: Tensor) -> Tensor:
    """Return the largest probability of each row; as integers they have the same order, and are compared faster."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[shares.element_size()]
    return shares.view(integers).amax(-1).view(shares.dtype)


def completion_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of completion tokens in nats, and how many of them were predicted rightly.

    hidden: (tokens, width), only positions that are trained on.  head: (vocab, width), frozen.  targets: (tokens,), int64.
    compute_dtype: of products; by default that of hidden and head.
    The gradient is formed in the forward pass, chunk by chunk, so that never more than 384 * vocab logits are held.
    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 3, done here in plain torch.
    """
    return _ChunkedLoss.apply(hidden, head, targets, compute_dtype or hidden.dtype)


class CompletionLoss:
    """The Trainer's loss function; counts on the side what the progress events tell."""

    def __init__(self, head: Tensor | None = None, compute_dtype: torch.dtype | None = None) -> None:
        """head: (vocab, width) of a model whose `logits` are the hidden states before it; None: they are logits.

        compute_dtype: of products with it; by default its own.
        """
        self._head, self._compute_dtype = head, compute_dtype
        self.counts = 0, 0  #: tokens trained on since the last `take_counts`, and those of them that were predicted rightly

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the summed loss of a micro-batch over the trained tokens of the whole optimizer step, in nats.

        outputs.logits: (samples, length, vocab or width).  labels: (samples, length), IGNORED where nothing is learnt.
        So each token of a step weighs the same, however the step is cut into micro-batches.
        """
        targets = labels[:, 1:]
        trained = targets != IGNORED
        states, targets = outputs.logits[:, :-1][trained], targets[trained]
        if self._head is None:
            loss = functional.cross_entropy(states.float(), targets, reduction="sum")
            correct = (states.detach().argmax(-1) == targets).sum()
        else:
            loss, correct = completion_loss(states, self._head, targets, self._compute_dtype)
        self.counts = self.counts[0] + targets.numel(), self.counts[1] + int(correct)
        return loss / (num_items_in_batch or targets.numel())

    def take_counts(self) -> list[int]:
        """Return the counts, and begin them anew."""
        counts, self.counts = self.counts, (0, 0)
        return [*counts]
