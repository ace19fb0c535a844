"""Compute the tokens of several answers in one forward pass. The tokens are concatenated into one row, without padding.

The linear layers compute all tokens together. Attention is computed separately for each answer, with the keys and values of
this answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sage.llm.workers.adapters import Adapter, Adapters

#: Name under which `_attention` is registered in transformers.
ATTENTION = "sage_serving_packed"
#: Capacity of a cache after its first allocation, in tokens. The capacity is smaller if the limit of the cache is smaller,
#: and larger if the first pass has more tokens.
_FIRST_ROOM_TOKENS = 256
#: Maximum number of prompt tokens in a pass. The number is small on a CPU, where a large pass would delay all answers.
_PROMPT_TOKENS = {"cpu": 128, "cuda": 2048}

#: Number of tokens in the prompt that tests a new adapter. In a mixture-of-experts model, this prompt uses several experts.
_PROBE_TOKENS = 16


class Abandoned(Exception):
    """All answers in the pass were cancelled."""


class KeyValueCache:
    """Keys and values of one answer, for all layers."""

    def __init__(self, layers: int, limit_tokens: int) -> None:
        self._layers, self._limit = layers, limit_tokens
        self._room = 0
        self.keys = self.values = torch.empty(0)  #: (layers, kv_heads, room, head_dim); room: capacity in tokens
        self.length = 0  #: number of stored tokens

    def reserve(self, tokens: int, key: Tensor, value: Tensor) -> None:
        """Increase the capacity if the cache has no space for `tokens` additional tokens.

        key, value: (kv_heads, any, head_dim). The cache gets the kv_heads, head_dim, dtype and device of these tensors.
        """
        if self.length + tokens <= self._room:
            return
        room = max(self.length + tokens, min(self._limit, max(_FIRST_ROOM_TOKENS, 2 * self._room)))
        self.keys = self._grown(self.keys, key, room)
        self.values = self._grown(self.values, value, room)
        self._room = room  # set only after both allocations, because an allocation can fail

    def _grown(self, old: Tensor, like: Tensor, room: int) -> Tensor:
        new = like.new_empty(self._layers, like.shape[0], room, like.shape[2])
        if self.length:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


@dataclass
class Part:
    """The tokens of one answer in the next pass."""

    cache: Any
    tokens: list[int]
    wants_all_logits: bool = False  #: False: only the logits of the last token are needed
    adapter: Adapter | None = None  #: None: only the base model


class _Pass:
    def __init__(self, parts: list[Part], check: Callable[[], None]) -> None:
        self._parts, self._check = parts, check
        self._lengths = [len(part.tokens) for part in parts]
        self._places: list[tuple[Any, Any, Any, Any]] = []  #: for each part: new keys, new values, all keys, all values
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self.windows: dict[int, int | None] = {}  #: keys: layer indices; values: sizes of sliding windows (None: no window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Store keys and values, and return the output of attention, (1, tokens, heads, head_dim).

        query: (1, heads, tokens, head_dim).  key, value: (1, kv_heads, tokens, head_dim).
        """
        self._check()
        if not self._places:
            self._places = [self._place(part, key[0], value[0]) for part in self._parts]
        self.windows[layer] = window
        torch._foreach_copy_([new[layer] for new, _, _, _ in self._places], list(key[0].split(self._lengths, 1)))
        torch._foreach_copy_([new[layer] for _, new, _, _ in self._places], list(value[0].split(self._lengths, 1)))
        outputs = [
            self._one(at, part, keys[layer], values[layer], scaling, window)
            for at, (part, (_, _, keys, values)) in enumerate(
                zip(query[0].split(self._lengths, 1), self._places, strict=True)
            )
        ]
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def _place(self, part: Part, key: Tensor, value: Tensor) -> tuple[Any, Any, Any, Any]:
        cache, count = part.cache, len(part.tokens)
        cache.reserve(count, key, value)
        end = cache.length + count
        return (
            cache.keys[:, :, cache.length : end].unbind(),
            cache.values[:, :, cache.length : end].unbind(),
            cache.keys[:, :, :end].unbind(),
            cache.values[:, :, :end].unbind(),
        )

    def _one(self, at: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
        """Return the output of one answer, (tokens, heads, head_dim).

        query: (heads, tokens, head_dim).  keys, values: (kv_heads, length, head_dim).
        """
        heads, tokens, _ = query.shape
        kv_heads, length, _ = keys.shape
        grouped = query.unflatten(0, (kv_heads, heads // kv_heads))  # (kv_heads, group, tokens, head_dim)
        if tokens == 1:  # query heads of a group share keys and values, so these heads are passed as tokens of one head
            if window and window < length:
                keys, values = keys[:, -window:], values[:, -window:]
            output = scaled_dot_product_attention(grouped[None, :, :, 0], keys[None], values[None], scale=scaling)
            return output.reshape(1, heads, -1)
        mask = self._mask(at, tokens, length, window, query)
        size = (-1, heads // kv_heads, -1, -1)
        output = scaled_dot_product_attention(
            grouped, keys[:, None].expand(size), values[:, None].expand(size), attn_mask=mask, is_causal=mask is None,
            scale=scaling,
        )  # fmt: skip
        return output.reshape(heads, tokens, -1).transpose(0, 1)

    def _mask(self, at: int, tokens: int, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return a mask of shape (tokens, length) to add to the attention scores; None if a plain causal mask is enough."""
        if tokens == length and (window is None or window >= length):
            return None
        if (at, window) not in self._masks:
            positions = torch.arange(length - tokens, length, device=like.device)[:, None]
            others = torch.arange(length, device=like.device)[None]
            is_hidden = others > positions
            if window:
                is_hidden |= others <= positions - window
            mask = torch.zeros(tokens, length, dtype=like.dtype, device=like.device)
            self._masks[at, window] = mask.masked_fill_(is_hidden, -torch.inf)
        return self._masks[at, window]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float | None = None,
    packed: _Pass | None = None, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if packed is None or options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("packed passes do not support this kind of attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed.attend(module.layer_idx, query, key, value, scale, sliding_window), None


AttentionInterface.register(ATTENTION, _attention)


class PackedRunner:
    """Runs parts of several answers in one forward pass."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.adapters = Adapters(model)
        self._layers = int(model.config.get_text_config().num_hidden_layers)
        self.prompt_tokens = _PROMPT_TOKENS[model.device.type]
        self.windows: dict[int, int | None] = {}  #: sizes of the sliding windows in the last pass, by layer index

    def new_cache(self, limit_tokens: int) -> KeyValueCache:
        """Return an empty cache for an answer.  limit_tokens: maximum length of prompt and answer together."""
        return KeyValueCache(self._layers, limit_tokens)

    def add(self, adapter: Adapter) -> None:
        """Prepare the layers that an adapter changes. Raises NotImplementedError if a pass cannot compute these layers."""
        self.adapters.hook(adapter)
        tokens = list(range(_PROBE_TOKENS))
        try:
            self.run([Part(self.new_cache(len(tokens)), tokens, adapter=adapter)], lambda: None)
        finally:
            self.adapters.forget(adapter)

    def run(self, parts: list[Part], check: Callable[[], None]) -> list[Tensor]:
        """Run the parts in one pass, and return the logits of each part, with the shape (tokens, vocab_size).

        The logits of a part have one row if only the last token's logits are needed.

        check: called in every layer. An exception from `check` ends the pass. A failed pass adds no tokens to the caches.
        """
        ids, positions, kept, counts = list[int](), list[int](), list[int](), list[int]()
        for part in parts:
            ids += part.tokens
            positions += range(part.cache.length, part.cache.length + len(part.tokens))
            counts.append(len(part.tokens) if part.wants_all_logits else 1)
            kept += range(len(ids) - counts[-1], len(ids))
        self.adapters.begin([part.adapter for part in parts], [len(part.tokens) for part in parts])
        packed, device = _Pass(parts, check), self._model.device
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=device),
            packed=packed,
        )
        for part in parts:
            part.cache.length += len(part.tokens)
        self.windows = packed.windows
        return list(output.logits[0].split(counts))
