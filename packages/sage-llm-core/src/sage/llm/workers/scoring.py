"""Log-probabilities of tokens in fp32, before temperature, penalties and filters."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sage.llm.workers.sampling import TokenScore
from sage.llm.workers.text import TextDecoder, TokenBytes

#: Prompts are scored in parts of this many tokens, because the logits of a whole prompt can take gigabytes.
_PROMPT_PART_TOKENS = 512
#: JSON has no infinity; OpenAI uses this value for tokens with probability 0.
_IMPOSSIBLE = -9999.0


class Scorer:
    """Converts logits to TokenScores."""

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._bytes, self._top = token_bytes, top

    def score(self, token: int, logits: Tensor | None, text_offset: int) -> TokenScore:
        """Return the score of `token`; logits: (vocab_size,), None for the first token."""
        if logits is None:
            return TokenScore(self._bytes.of(token), None, (), text_offset)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, ids = logprobs.topk(min(self._top, len(logprobs)))
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenScore(
            self._bytes.of(token),
            _finite(float(logprobs[token])),
            tuple((self._bytes.of(other), _finite(value)) for other, value in top),
            text_offset,
        )


def _finite(value: float) -> float:
    return max(_IMPOSSIBLE, value)  # this order also replaces NaN


def prompt_scores(
    model: Any, prompt: list[int], scorer: Scorer, decoder: TextDecoder, look: Callable[[], None]
) -> Iterator[tuple[str, TokenScore]]:
    """Yield each token of a prompt with the text that it completes; `look` is called between the parts."""
    options: dict[str, Any] = {"past_key_values": None, "use_cache": True}
    length = _PROMPT_PART_TOKENS
    if "past_key_values" not in inspect.signature(model.forward).parameters:  # state space models: all at once
        options, length = {"use_cache": False}, len(prompt)
    before = None
    for start in range(0, len(prompt), length):
        look()
        part = prompt[start : start + length]
        output = model(input_ids=torch.tensor([part], device=model.device), **options)
        if options["use_cache"]:
            options["past_key_values"] = output.past_key_values
        for at, token in enumerate(part):
            score = scorer.score(token, before, decoder.characters)
            before = output.logits[0, at]
            yield decoder.push(token), score
        del output


class LastLogits:
    """Context manager that keeps the model's last logits, before any processor changes them."""

    def __init__(self, model: Any) -> None:
        self._model, self.logits = model, torch.empty(0)

    def __enter__(self) -> "LastLogits":
        self._hook = self._model.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, _model: Any, _inputs: Any, output: Any) -> None:
        self.logits = output.logits[0, -1]
