"""Matrix products in chunks that fit the processor's cache."""

import functools

import torch
from torch import Tensor

#: Approximate size of one chunk of rows, divided by the total size of the L2 caches of all threads.
_CACHE_SHARE = 0.3
#: Chunk sizes of products with lm_head. Such chunks fit the processor's cache.
#: _CHUNK_VOCAB: number of vocabulary entries per chunk, if lm_head is cast to the compute dtype.
#: _CHUNK_ROWS: number of tokens per chunk in the backward pass, if lm_head is not cast.
_CHUNK_ROWS, _CHUNK_VOCAB = 192, 4096


def product(left: Tensor, right: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return left @ right. If `onto` is given, the product is added to `onto` in place, and `onto` is returned.

    left: (rows, inner).  right: (inner, columns).  On a CPU in bf16, oneDNN reads the whole of `left` again for each
    strip of columns of `right`. This is slow if `left` does not fit the cache. Therefore, if the result has fewer columns
    than `left`, the product is computed for one chunk of rows after another.
    """
    pieces = _pieces(left, right)
    if pieces == 1:
        return left @ right if onto is None else onto.addmm_(left, right)
    out = left.new_empty(left.shape[0], right.shape[1]) if onto is None else onto
    for rows, target in zip(left.chunk(pieces), out.chunk(pieces), strict=True):
        if onto is None:
            torch.mm(rows, right, out=target)
        else:
            target.addmm_(rows, right)
    return out


def lm_head_logits(states: Tensor, lm_head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Compute states @ lm_head.t(), (rows, vocab), in `compute_dtype`, and return the logits in the dtype of the states."""
    if states.dtype is compute_dtype:
        return states @ lm_head.t()
    wide, out = states.to(compute_dtype), states.new_empty(len(states), len(lm_head))
    for columns, part in zip(out.split(_CHUNK_VOCAB, dim=1), lm_head.split(_CHUNK_VOCAB), strict=True):
        columns.copy_(wide @ part.to(compute_dtype).t())
    return out


def lm_head_backward(grad_logits: Tensor, lm_head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return grad_logits @ lm_head, (rows, hidden_size), in `compute_dtype`."""
    if grad_logits.dtype is compute_dtype:
        if grad_logits.is_cuda:
            return grad_logits @ lm_head
        return torch.cat([piece @ lm_head for piece in grad_logits.split(_CHUNK_ROWS)])
    out = grad_logits.new_zeros(len(grad_logits), lm_head.shape[1], dtype=compute_dtype)
    for columns, part in zip(grad_logits.split(_CHUNK_VOCAB, dim=1), lm_head.split(_CHUNK_VOCAB), strict=True):
        out.addmm_(columns.to(compute_dtype), part.to(compute_dtype))
    return out


def _pieces(left: Tensor, right: Tensor) -> int:
    if left.dtype is not torch.bfloat16 or left.device.type != "cpu" or right.shape[1] >= right.shape[0]:
        return 1
    cache_bytes = _CACHE_SHARE * _l2_bytes() * torch.get_num_threads()
    return max(1, round(left.numel() * left.element_size() / cache_bytes))


@functools.cache
def _l2_bytes() -> int:
    return int(torch.cpu.get_capabilities().get("l2_cache_size", 2**20))
