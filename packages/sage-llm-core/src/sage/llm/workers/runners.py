"""Choose the runner for a model.

A packed pass computes tokens of several answers in one forward pass. Packed passes are used if they give the same logits as
the model's own forward pass.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sage.libs.models.memory import is_out_of_memory
from sage.llm.workers.packed import ATTENTION, PackedRunner, Part
from sage.llm.workers.sequential import SequentialRunner

logger = logging.getLogger(__name__)
#: For each data type: the largest difference that rounding can cause between logits, relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
#: Types of rotary embeddings whose values depend on the longest answer in a pass.
_SHARED_ROPE = frozenset({"dynamic", "longrope"})


class Runner(Protocol):
    """Runs forward passes."""

    prompt_tokens: int  #: maximum number of prompt tokens in one pass

    def new_cache(self, limit_tokens: int) -> Any:
        """Return an empty cache for one answer."""

    def run(self, parts: list[Part], check: Callable[[], None]) -> list[Tensor]:
        """Run a forward pass with the tokens of the parts, and return the logits of each part.

        Shape of a part's logits: (tokens of the part, vocab_size), or (1, vocab_size) if `wants_all_logits` is False.
        check: called in every layer; may raise an exception to end the pass.
        """


def runner_for(model: Any) -> Runner:
    """Return a PackedRunner, or a SequentialRunner if packed passes do not work for the model."""
    own = model.config._attn_implementation  # noqa: SLF001 # transformers has no public getter
    try:
        if problem := _packed_problem(model):
            raise NotImplementedError(problem)
    except Exception as error:  # unsupported models raise all kinds of exceptions
        if is_out_of_memory(error):
            raise
        model.set_attn_implementation(own)
        logger.warning("This model answers only one request at a time: %s", error)
        return SequentialRunner(model)
    return PackedRunner(model)


def _packed_problem(model: Any) -> str | None:
    """Return why packed passes do not work. If they work, switch the model to packed attention and return None."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _SHARED_ROPE:
        return f"its {rope['rope_type']} rotary embedding depends on the length of the whole batch"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {min(others)}"
    known = min(config.vocab_size, model.get_input_embeddings().num_embeddings)
    prompts = [[(7 * at + 3 * shift) % known for at in range(length)] for shift, length in enumerate((24, 9))]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1] for ids in prompts]
        model.set_attn_implementation(ATTENTION)
        runner = PackedRunner(model)
        long, short = (runner.new_cache(len(ids)) for ids in prompts)
        runner.run([Part(long, prompts[0][:16]), Part(short, prompts[1][:-1])], lambda: None)
        found = runner.run([Part(long, prompts[0][16:]), Part(short, prompts[1][-1:])], lambda: None)
    if runner.windows != _expected_windows(config):
        return "packed attention uses other sliding windows than the model's configuration"
    for own, packed in zip(expected, found, strict=True):
        if float((own - packed[-1]).abs().max()) > _TOLERANCE[model.dtype] * float(own.abs().max()):
            return "packed attention gives other logits than the model's own attention"
    return None


def _expected_windows(config: Any) -> dict[int, int | None]:
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    return {at: window if kind == "sliding_attention" else None for at, kind in enumerate(types)}
