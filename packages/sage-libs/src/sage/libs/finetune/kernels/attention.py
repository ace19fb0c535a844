"""Causal attention over packed samples: each attends to itself alone, and no score between two of them is computed.

Samples are short in fine-tuning, so an explicit softmax over batched matrix products beats a tiled kernel; long ones are
cut into blocks of queries, which bounds the memory. Grouped heads share their keys without repeating them.
"""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Name under which transformers' attention interface knows `attention_interface`.
NAME = "sage_packed"
#: Queries whose scores are computed at once; the probabilities of a sample of one block are kept for the backward.
_BLOCK = 256
#: Samples are filled up to a multiple of this many tokens: matrix products are compiled for each size that they meet.
_STEP = 32


@dataclass(frozen=True)
class Shape:
    """How the columns of a projection are to be read: queries of all heads, then keys, then values."""

    heads: int
    key_heads: int
    width: int  #: of one head
    scaling: float
    window: int | None = None  #: how many tokens back a query sees, itself included; None: all
    compute_dtype: torch.dtype | None = None  #: in which it is computed; None: those of the columns

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.key_heads


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rotary: tuple[Tensor, Tensor] | None, bounds: Sequence[int], shape: Shape
    ) -> Tensor:
        compute_dtype = shape.compute_dtype or projected.dtype
        outputs = projected.new_empty(projected.shape[0], shape.heads * shape.width)
        outputs[bounds[-1] :] = 0
        kept: list[Tensor | None] = []
        for start, stop in itertools.pairwise(bounds):
            query, key, value = _split(
                projected[start:stop].to(compute_dtype), _rows(rotary, start, stop, compute_dtype), shape
            )
            target = _by_head(outputs[start:stop], shape)
            for rows, seen in _blocks(key.shape[1], shape.window):
                weights = _weights(query, key, rows, seen, shape)
                block = torch.bmm(weights, value[:, seen]).view(shape.key_heads, shape.groups, -1, shape.width)
                part = target[:, :, rows]
                part.copy_(block[:, :, : part.shape[2]])
            kept += _to(projected.dtype, query, key, value, weights if key.shape[1] <= _BLOCK else None)
        ctx.save_for_backward(*kept)
        ctx.rotary, ctx.bounds, ctx.shape = rotary, bounds, shape
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shape, bounds, kept = ctx.shape, ctx.bounds, ctx.saved_tensors
        compute_dtype = shape.compute_dtype or grad.dtype
        columns = (shape.heads + 2 * shape.key_heads) * shape.width
        grad_projected = grad.new_empty(grad.shape[0], columns, dtype=compute_dtype)
        grad_projected[bounds[-1] :] = 0
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            query, key, value, weights = _to(compute_dtype, *kept[4 * index : 4 * index + 4])
            grads = _sample_backward(_by_head(grad[start:stop], shape), query, key, value, weights, shape)
            _join(grads, grad_projected[start:stop], _rows(ctx.rotary, start, stop, compute_dtype), shape)
        return grad_projected.to(grad.dtype), None, None, None


def packed_attention(projected: Tensor, rotary: tuple[Tensor, Tensor] | None, bounds: Sequence[int], shape: Shape) -> Tensor:
    """Return (tokens, heads * width) for the (tokens, (heads + 2 * key_heads) * width) columns of query, key and value.

    rotary: cosines and sines, (tokens, width), by which queries and keys are turned; None: they are already.
    bounds: where each sample begins, and where the last one ends.
    """
    if projected.is_cuda and (shape.window is None or max(map(operator.sub, bounds[1:], bounds)) <= shape.window):
        return fused_attention(projected, rotary, bounds, shape)
    return _PackedAttention.apply(projected, rotary, bounds, shape)


def fused_attention(projected: Tensor, rotary: tuple[Tensor, Tensor] | None, bounds: Sequence[int], shape: Shape) -> Tensor:
    """Return what `packed_attention` does, through torch's own attention: on a GPU a kernel that holds no scores.

    It knows no window.
    """
    columns = projected.view(projected.shape[0], -1, shape.width).transpose(0, 1)
    turned, value = columns.split([shape.heads + shape.key_heads, shape.key_heads])
    if rotary is not None:
        cosine, sine = (angles[:, : shape.width // 2] for angles in rotary)
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    query, key = turned.split([shape.heads, shape.key_heads])
    outputs = [
        nn.functional.scaled_dot_product_attention(
            *(states[None, :, start:stop] for states in (query, key, value)),
            is_causal=True,
            scale=shape.scaling,
            enable_gqa=shape.groups > 1,
        )[0]
        for start, stop in itertools.pairwise(bounds)
    ]
    joined = torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)
    return nn.functional.pad(joined, (0, 0, 0, projected.shape[0] - bounds[-1]))


@functools.lru_cache(maxsize=1)
def bounds_of(cu_seq_lens: Tensor) -> list[int]:
    """Return where samples begin and the last one ends; every layer asks for one tensor, a GPU is asked for it once."""
    return [int(bound) for bound in cu_seq_lens.tolist()]


def attention_interface(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_more: Any,
) -> tuple[Tensor, None]:
    """Packed attention as transformers' attention interface calls it; query, key and value: (1, heads, tokens, width)."""
    assert cu_seq_lens_q is not None, "the samples' bounds are needed"
    shape = Shape(query.shape[1], key.shape[1], query.shape[3], scaling or query.shape[3] ** -0.5, sliding_window)
    tokens = query.shape[2]
    projected = torch.cat([states[0].transpose(0, 1).reshape(tokens, -1) for states in (query, key, value)], dim=1)
    outputs = packed_attention(projected, None, bounds_of(cu_seq_lens_q), shape)
    return outputs.view(1, tokens, shape.heads, shape.width), None


def _sample_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a sample's query, key and value, in their shapes.

    grad: (key_heads, groups, tokens, width), without what fills the sample up.
    """
    filled = torch.zeros_like(query)
    filled[:, :, : grad.shape[2]] = grad
    if probabilities is not None:
        return _block_backward(filled.flatten(1, 2), query.flatten(1, 2), key, value, probabilities, shape)
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, seen in _blocks(key.shape[1], shape.window):
        weights = _weights(query, key, rows, seen, shape)
        arrived, asked = (states[:, :, rows].reshape(shape.key_heads, -1, shape.width) for states in (filled, query))
        part = _block_backward(arrived, asked, key[:, seen], value[:, seen], weights, shape)
        grads[0][:, :, rows] = part[0].view(shape.key_heads, shape.groups, -1, shape.width)
        grads[1][:, seen] += part[1]
        grads[2][:, seen] += part[2]
    return grads


def _block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block's queries, (key_heads, groups * queries, width), and of the keys and values seen."""
    grad_weights = torch.bmm(grad, value.mT)
    scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # noqa: SLF001 - has no public name
    scores.mul_(shape.scaling)
    return torch.bmm(scores, key), torch.bmm(scores.mT, query), torch.bmm(weights.mT, grad)


def _weights(query: Tensor, key: Tensor, rows: slice, seen: slice, shape: Shape) -> Tensor:
    """Return the probabilities of a block of queries over the keys they see, (key_heads, groups * queries, keys)."""
    block = query[:, :, rows].reshape(shape.key_heads, -1, shape.width)
    scores = torch.baddbmm(block.new_empty(1), block, key[:, seen].mT, beta=0, alpha=shape.scaling)
    count = rows.stop - rows.start
    each = scores.view(shape.key_heads, shape.groups, count, -1)
    each[..., -count:] += _later(query.dtype, query.device)[:count, :count]
    if shape.window is not None and rows.stop > shape.window:
        ages = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(seen.start, seen.stop)
        each.masked_fill_((ages >= shape.window).to(query.device), float("-inf"))
    return scores.softmax(-1)


@functools.cache
def _later(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return -inf where a key of a block comes after the query, 0 elsewhere, (_BLOCK, _BLOCK)."""
    return torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=dtype, device=device).triu_(1)


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the keys that any of them sees."""
    for start in range(0, tokens, _BLOCK):
        stop = min(start + _BLOCK, tokens)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _by_head(columns: Tensor, shape: Shape) -> Tensor:
    """Return a view of (tokens, heads * width) as (key_heads, groups, tokens, width)."""
    return columns.view(columns.shape[0], shape.key_heads, shape.groups, shape.width).permute(1, 2, 0, 3)


def _split(projected: Tensor, rotary: tuple[Tensor, Tensor] | None, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sample's query (key_heads, groups, tokens, width), key and value (key_heads, tokens, width), filled up."""
    tokens = projected.shape[0]
    columns = projected.view(tokens, -1, shape.width).transpose(0, 1)
    filled = projected.new_zeros(columns.shape[0], -(-tokens // _STEP) * _STEP, shape.width)
    turned = slice(0, -shape.key_heads)
    if rotary is None:
        filled[:, :tokens] = columns
    else:
        _turn(columns[turned], *rotary, filled[turned, :tokens])
        filled[-shape.key_heads :, :tokens] = columns[-shape.key_heads :]
    query, key, value = filled.split([shape.heads, shape.key_heads, shape.key_heads])
    return query.view(shape.key_heads, shape.groups, -1, shape.width), key, value


def _join(
    grads: tuple[Tensor, Tensor, Tensor], projected: Tensor, rotary: tuple[Tensor, Tensor] | None, shape: Shape
) -> None:
    """Write the gradients of query, key and value into those of the columns: the way back of `_split`."""
    tokens = projected.shape[0]
    columns = projected.view(tokens, -1, shape.width).transpose(0, 1)
    query, key, value = (grad.reshape(-1, grads[1].shape[1], shape.width)[:, :tokens] for grad in grads)
    columns[-shape.key_heads :] = value
    for states, at in ((query, slice(0, shape.heads)), (key, slice(shape.heads, -shape.key_heads))):
        if rotary is None:
            columns[at] = states
        else:
            cosine, sine = rotary
            _turn(states, cosine, -sine, columns[at])


def _turn(states: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> Tensor:
    """Write (heads, tokens, width) turned by (tokens, width // 2) angles into `out`, and return it.

    Source: Su et al. 2021, "RoFormer", in the layout of transformers: the halves of a head are the pairs' members.
    """
    first, second = states.chunk(2, dim=-1)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=turned_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned_second).addcmul_(first, sine)
    return out


def _to(dtype: torch.dtype, *states: Any) -> list[Any]:
    """Return states in a dtype; what is not there stays so."""
    return [None if each is None else each.to(dtype) for each in states]


def _rows(
    rotary: tuple[Tensor, Tensor] | None, start: int, stop: int, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    half = rotary[0].shape[-1] // 2
    return rotary[0][start:stop, :half].to(compute_dtype), rotary[1][start:stop, :half].to(compute_dtype)
