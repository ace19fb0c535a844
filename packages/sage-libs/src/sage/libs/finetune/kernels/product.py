"""Matrix products cut so that the processor reads as little as it can."""

import functools

import torch
from torch import Tensor

#: Share of the second-level cache that the rows of one piece may fill, all threads' caches taken together.
_CACHE_SHARE = 0.3


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


def _pieces(left: Tensor, right: Tensor) -> int:
    if left.dtype is not torch.bfloat16 or left.device.type != "cpu" or right.shape[1] >= right.shape[0]:
        return 1
    cache_bytes = _CACHE_SHARE * _l2_bytes() * torch.get_num_threads()
    return max(1, round(left.numel() * left.element_size() / cache_bytes))


@functools.cache
def _l2_bytes() -> int:
    return int(torch.cpu.get_capabilities().get("l2_cache_size", 2**20))
