"""Causal attention over packed samples: a token attends only to tokens of its own sample.

On a CPU, an explicit softmax over batched matrix products is faster than a tiled kernel, because samples are short in
fine-tuning. To limit the memory, the queries of a long sample are split into blocks.
"""

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9 and older
    varlen_attn = None

#: Name under which `attention_interface` is registered in transformers.
NAME = "sage_packed"
#: Number of queries per block. For a sample with only one block, the attention weights are saved for the backward pass.
_BLOCK = 256
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters if varlen_attn else {}
#: Samples are padded to a multiple of this many tokens, because oneDNN compiles a matrix product for each new size.
_LENGTH_MULTIPLE = 32


@dataclass(frozen=True)
class AttentionShape:
    """Shape and options of attention.

    A fused projection contains the columns of all query heads, then of all key heads, then of all value heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None = None  #: size of the sliding window in tokens, including the query's own token; None: no window
    compute_dtype: torch.dtype | None = None  #: None: use the dtype of the projection

    @property
    def groups(self) -> int:
        """Number of query heads per key-value head."""
        return self.num_heads // self.num_kv_heads


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rotary: tuple[Tensor, Tensor] | None, cu_seqlens: Sequence[int], shape: AttentionShape
    ) -> Tensor:
        compute_dtype = shape.compute_dtype or projected.dtype
        outputs = projected.new_empty(projected.shape[0], shape.num_heads * shape.head_dim)
        outputs[cu_seqlens[-1] :] = 0
        kept: list[Tensor | None] = []
        for start, stop in itertools.pairwise(cu_seqlens):
            query, key, value = _split(
                projected[start:stop].to(compute_dtype), _rotary_rows(rotary, start, stop, compute_dtype), shape
            )
            target = _by_head(outputs[start:stop], shape)
            for rows, seen in _blocks(key.shape[1], shape.window):
                weights = _weights(query, key, rows, seen, shape)
                block = torch.bmm(weights, value[:, seen]).view(shape.num_kv_heads, shape.groups, -1, shape.head_dim)
                part = target[:, :, rows]
                part.copy_(block[:, :, : part.shape[2]])
            kept += _cast(projected.dtype, query, key, value, weights if key.shape[1] <= _BLOCK else None)
        ctx.save_for_backward(*kept)
        ctx.rotary, ctx.cu_seqlens, ctx.shape = rotary, cu_seqlens, shape
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shape, cu_seqlens, kept = ctx.shape, ctx.cu_seqlens, ctx.saved_tensors
        compute_dtype = shape.compute_dtype or grad.dtype
        columns = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        grad_projected = grad.new_empty(grad.shape[0], columns, dtype=compute_dtype)
        grad_projected[cu_seqlens[-1] :] = 0
        for index, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
            query, key, value, weights = _cast(compute_dtype, *kept[4 * index : 4 * index + 4])
            grads = _sample_backward(_by_head(grad[start:stop], shape), query, key, value, weights, shape)
            _join(grads, grad_projected[start:stop], _rotary_rows(ctx.rotary, start, stop, compute_dtype), shape)
        return grad_projected.to(grad.dtype), None, None, None


def packed_attention(
    projected: Tensor, rotary: tuple[Tensor, Tensor] | None, cu_seqlens: Sequence[int], shape: AttentionShape
) -> Tensor:
    """Return the attention outputs, (tokens, num_heads * head_dim), for fused queries, keys and values.

    projected: (tokens, (num_heads + 2 * num_kv_heads) * head_dim).
    rotary: cosines and sines of the rotation angles, each (tokens, head_dim). None: queries and keys are already rotated.
    cu_seqlens: index of the first token of each sample, followed by the total number of tokens of the samples.
    """
    if varlen_attn and projected.is_cuda and projected.dtype is torch.bfloat16:
        return fused_attention(projected, rotary, cu_seqlens, shape, _varlen)
    if projected.is_cuda and (shape.window is None or _longest(cu_seqlens) <= shape.window):
        return fused_attention(projected, rotary, cu_seqlens, shape)
    return _PackedAttention.apply(projected, rotary, cu_seqlens, shape)


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Sequence[int], AttentionShape], Tensor]


def _sample_by_sample(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Sequence[int], shape: AttentionShape) -> Tensor:
    """Attend with torch's scaled_dot_product_attention, which does not support sliding windows.

    query, key, value: (tokens, heads, head_dim). The result has the shape of the query.
    """
    outputs = [
        nn.functional.scaled_dot_product_attention(
            *(states[None, start:stop].transpose(1, 2) for states in (query, key, value)),
            is_causal=True,
            scale=shape.scaling,
            enable_gqa=shape.groups > 1,
        )[0].transpose(0, 1)
        for start, stop in itertools.pairwise(cu_seqlens)
    ]
    return torch.cat(outputs)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Sequence[int], shape: AttentionShape) -> Tensor:
    """Attend like `_sample_by_sample`, with one FlashAttention kernel for all samples. Needs a GPU and 16-bit tensors."""
    bounds, longest = _bounds(tuple(cu_seqlens), query.device), _longest(cu_seqlens)
    window = (-1 if shape.window is None else shape.window - 1, 0)  # the numbers of earlier and of later keys
    # Releases of torch without this parameter accept fewer key heads than query heads.
    grouped = {"enable_gqa": shape.groups > 1} if "enable_gqa" in _VARLEN_PARAMETERS else {}
    given = query.contiguous(), key.contiguous(), value.contiguous(), bounds, bounds, longest, longest
    return varlen_attn(*given, scale=shape.scaling, window_size=window, **grouped)


def fused_attention(
    projected: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cu_seqlens: Sequence[int],
    shape: AttentionShape,
    attend: Attend = _sample_by_sample,
) -> Tensor:
    """Compute `packed_attention` with a kernel of torch that does not store the attention scores on a GPU."""
    tokens = projected.shape[0]
    columns = projected.view(tokens, -1, shape.head_dim)
    rotated, value = columns.split([shape.num_heads + shape.num_kv_heads, shape.num_kv_heads], dim=1)
    if rotary is not None:
        cosine, sine = (angles[:, None, : shape.head_dim // 2] for angles in rotary)
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    query, key = rotated.split([shape.num_heads, shape.num_kv_heads], dim=1)
    used = cu_seqlens[-1]  # the other tokens are padding
    outputs = attend(query[:used], key[:used], value[:used], cu_seqlens, shape).flatten(1)
    return nn.functional.pad(outputs, (0, 0, 0, tokens - used))


@functools.lru_cache(maxsize=1)
def _bounds(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `cu_seqlens` as a tensor. The last result is cached, because all layers of a step have the same samples."""
    with torch.inference_mode(mode=False):  # a training step may get a tensor that was created during an evaluation
        return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def _longest(cu_seqlens: Sequence[int]) -> int:
    """Return the number of tokens of the longest sample."""
    return max(map(operator.sub, cu_seqlens[1:], cu_seqlens))


@functools.lru_cache(maxsize=1)
def cu_seqlens_as_list(cu_seq_lens: Tensor) -> list[int]:
    """Return `cu_seq_lens` as a list.

    The last result is cached, so that only the first layer of a step copies the tensor from the GPU.
    """
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
    """Call `packed_attention` for a layer of transformers.  query, key, value: (1, heads, tokens, head_dim)."""
    assert cu_seq_lens_q is not None, "cu_seq_lens_q is missing"
    shape = AttentionShape(query.shape[1], key.shape[1], query.shape[3], scaling or query.shape[3] ** -0.5, sliding_window)
    tokens = query.shape[2]
    projected = torch.cat([states[0].transpose(0, 1).reshape(tokens, -1) for states in (query, key, value)], dim=1)
    outputs = packed_attention(projected, None, cu_seqlens_as_list(cu_seq_lens_q), shape)
    return outputs.view(1, tokens, shape.num_heads, shape.head_dim), None


def _sample_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor | None, shape: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the query, key and value of one sample, in the shapes of these tensors.

    grad: (num_kv_heads, groups, tokens, head_dim), without padding.
    probabilities: the attention weights that the forward pass saved. None: the weights are recomputed block by block.
    """
    filled = torch.zeros_like(query)
    filled[:, :, : grad.shape[2]] = grad
    if probabilities is not None:
        return _block_backward(filled.flatten(1, 2), query.flatten(1, 2), key, value, probabilities, shape)
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, seen in _blocks(key.shape[1], shape.window):
        weights = _weights(query, key, rows, seen, shape)
        block_grad, block_query = (
            states[:, :, rows].reshape(shape.num_kv_heads, -1, shape.head_dim) for states in (filled, query)
        )
        part = _block_backward(block_grad, block_query, key[:, seen], value[:, seen], weights, shape)
        grads[0][:, :, rows] = part[0].view(shape.num_kv_heads, shape.groups, -1, shape.head_dim)
        grads[1][:, seen] += part[1]
        grads[2][:, seen] += part[2]
    return grads


def _block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, shape: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for one block.  query: (num_kv_heads, groups * queries, head_dim)."""
    grad_weights = torch.bmm(grad, value.mT)
    scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # noqa: SLF001 - has no public name
    scores.mul_(shape.scaling)
    return torch.bmm(scores, key), torch.bmm(scores.mT, query), torch.bmm(weights.mT, grad)


def _weights(query: Tensor, key: Tensor, rows: slice, seen: slice, shape: AttentionShape) -> Tensor:
    """Return the attention weights of a block of queries, (num_kv_heads, groups * queries, keys)."""
    block = query[:, :, rows].reshape(shape.num_kv_heads, -1, shape.head_dim)
    scores = torch.baddbmm(block.new_empty(1), block, key[:, seen].mT, beta=0, alpha=shape.scaling)
    count = rows.stop - rows.start
    each = scores.view(shape.num_kv_heads, shape.groups, count, -1)
    each[..., -count:] += causal_mask(query.dtype, query.device)[:count, :count]
    if shape.window is not None and rows.stop > shape.window:
        distances = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(seen.start, seen.stop)
        each.masked_fill_((distances >= shape.window).to(query.device), float("-inf"))
    return scores.softmax(-1)


@functools.cache
def causal_mask(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a causal mask, (_BLOCK, _BLOCK): -inf if the key (column) comes after the query (row), else 0."""
    return torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=dtype, device=device).triu_(1)


def _blocks(tokens: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield slices of queries, each with the slice of keys that these queries attend to."""
    for start in range(0, tokens, _BLOCK):
        stop = min(start + _BLOCK, tokens)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _by_head(columns: Tensor, shape: AttentionShape) -> Tensor:
    """Return a view of `columns` (tokens, heads * head_dim) with the shape (num_kv_heads, groups, tokens, head_dim)."""
    return columns.view(columns.shape[0], shape.num_kv_heads, shape.groups, shape.head_dim).permute(1, 2, 0, 3)


def _split(projected: Tensor, rotary: tuple[Tensor, Tensor] | None, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sample's query (num_kv_heads, groups, tokens, head_dim), key and value (num_kv_heads, tokens, head_dim).

    All three are padded to a multiple of _LENGTH_MULTIPLE tokens.
    """
    tokens = projected.shape[0]
    columns = projected.view(tokens, -1, shape.head_dim).transpose(0, 1)
    filled = projected.new_zeros(columns.shape[0], -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, shape.head_dim)
    rotated = slice(0, -shape.num_kv_heads)
    if rotary is None:
        filled[:, :tokens] = columns
    else:
        apply_rotary(columns[rotated], *rotary, filled[rotated, :tokens])
        filled[-shape.num_kv_heads :, :tokens] = columns[-shape.num_kv_heads :]
    query, key, value = filled.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
    return query.view(shape.num_kv_heads, shape.groups, -1, shape.head_dim), key, value


def _join(
    grads: tuple[Tensor, Tensor, Tensor], projected: Tensor, rotary: tuple[Tensor, Tensor] | None, shape: AttentionShape
) -> None:
    """Write the gradients of query, key and value to the columns of `projected`. This is the backward pass of `_split`."""
    tokens = projected.shape[0]
    columns = projected.view(tokens, -1, shape.head_dim).transpose(0, 1)
    query, key, value = (grad.reshape(-1, grads[1].shape[1], shape.head_dim)[:, :tokens] for grad in grads)
    columns[-shape.num_kv_heads :] = value
    for states, at in ((query, slice(0, shape.num_heads)), (key, slice(shape.num_heads, -shape.num_kv_heads))):
        if rotary is None:
            columns[at] = states
        else:
            cosine, sine = rotary
            apply_rotary(states, cosine, -sine, columns[at])


def apply_rotary(states: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> Tensor:
    """Apply rotary embeddings to `states` (heads, tokens, head_dim), write the result to `out`, and return `out`.

    cosine, sine: cosines and sines of the rotation angles, (tokens, head_dim // 2). Dimension i is paired with dimension
    i + head_dim / 2, as in transformers.
    Source: Su et al. 2021, "RoFormer".
    """
    first, second = states.chunk(2, dim=-1)
    rotated_first, rotated_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=rotated_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=rotated_second).addcmul_(first, sine)
    return out


def _cast(dtype: torch.dtype, *states: Any) -> list[Any]:
    return [None if each is None else each.to(dtype) for each in states]


def _rotary_rows(
    rotary: tuple[Tensor, Tensor] | None, start: int, stop: int, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    half = rotary[0].shape[-1] // 2
    return rotary[0][start:stop, :half].to(compute_dtype), rotary[1][start:stop, :half].to(compute_dtype)
