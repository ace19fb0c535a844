"""Compute tokens of only one answer in each pass, for models that give wrong results with several answers in a pass."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from sage.llm.workers.packed import Part

#: Maximum number of prompt tokens in a pass. Long prompts are run in parts, because their logits can take gigabytes.
_PROMPT_TOKENS = 512
#: Value of `SequentialRunner.prompt_tokens` if there is no limit.
_WHOLE = 10**9


class _State:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.memory: Any = None


class SequentialRunner:
    """Each forward pass computes tokens of only one answer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        known = inspect.signature(model.forward).parameters
        names = ("past_key_values", "cache_params")
        self._memory_name = next((name for name in names if name in known), None)
        self._keeps_logits = "logits_to_keep" in known
        #: Maximum number of prompt tokens in a pass. There is no limit for models without `past_key_values`. There is also
        #: no limit for models with state space layers, because these layers cannot run a prompt in parts.
        self.prompt_tokens = _PROMPT_TOKENS if self._memory_name == names[0] and not _has_states(model) else _WHOLE
        self._check: Callable[[], None] = lambda: None
        for layer in _layers(model):
            layer.register_forward_pre_hook(lambda *_: self._check())

    def new_cache(self, _limit_tokens: int) -> _State:
        """Return an empty cache for an answer."""
        return _State()

    def run(self, parts: list[Part], check: Callable[[], None]) -> list[Tensor]:
        """Run the only item of `parts`, and return a list that contains only the logits of this item.

        Shape of the logits: (tokens of the item, vocab_size), or (1, vocab_size) if `wants_all_logits` is False.
        check: called before every layer.
        """
        (part,) = parts
        self._check = check
        state, options = part.cache, dict[str, Any]()
        state.tokens += part.tokens
        ids = part.tokens if self._memory_name else state.tokens
        if self._memory_name:
            options = {"use_cache": True, self._memory_name: state.memory}
        count = len(part.tokens) if part.wants_all_logits else 1
        if self._keeps_logits:
            options["logits_to_keep"] = count
        output = self._model(input_ids=torch.tensor([ids], device=self._model.device), **options)
        if self._memory_name:
            state.memory = getattr(output, self._memory_name)
        return [output.logits[0, -count:]]


def _has_states(model: Any) -> bool:
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _layers(model: Any) -> list[torch.nn.Module]:
    """Return the transformer layers: the ModuleList with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters()), default=[]))
