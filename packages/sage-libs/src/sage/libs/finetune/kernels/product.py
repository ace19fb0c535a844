"""Matrix products cut so that the processor reads as little as it can."""

import functools

import torch
from torch import Tensor

#: Share of the second-level cache that the rows of one piece may fill, all threads' caches taken together.
_CACHE_SHARE = 0.3
#: A product with the whole vocabulary is fastest in pieces that stay in the processor's cache: of so many rows, or, where a
#: part of the head is first made wider, of so many tokens of the vocabulary.
_ROWS, _PART = 192, 4096


def product(left: Tensor, right: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return left @ right, or `onto` with it added in place.

    left: (rows, inner).  right: (inner, columns).  In bf16 on a CPU, where the result is narrower than `left`, some rows are
    computed at a time: oneDNN reads them once for each strip of columns, from the cache if they fit in there.
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


def to_vocabulary(states: Tensor, head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return states @ head.t(), (rows, vocab), in the dtype of both and computed in `compute_dtype`."""
    if states.dtype is compute_dtype:
        return states @ head.t()
    wide, out = states.to(compute_dtype), states.new_empty(len(states), len(head))
    for columns, part in zip(out.split(_PART, dim=1), head.split(_PART), strict=True):
        columns.copy_(wide @ part.to(compute_dtype).t())
    return out


def from_vocabulary(shares: Tensor, head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return shares @ head, (rows, width), in `compute_dtype`."""
    if shares.dtype is compute_dtype:
        return torch.cat([piece @ head for piece in shares.split(_ROWS)])
    out = shares.new_zeros(len(shares), head.shape[1], dtype=compute_dtype)
    for columns, part in zip(shares.split(_PART, dim=1), head.split(_PART), strict=True):
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
