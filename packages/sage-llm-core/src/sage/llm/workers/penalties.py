"""OpenAI's logit adjustments that transformers lacks: logit_bias, frequency and presence penalty."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from sage.llm.workers.sampling import Sampling


class LogitBias(LogitsProcessor):
    """Adds a bias to the logits of given tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._values = list(biases), list(biases.values())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (1, vocab_size) scores."""
        scores[:, self._tokens] += scores.new_tensor(self._values)
        return scores


class OccurrencePenalty(LogitsProcessor):
    """Lowers the logits of tokens in the answer: frequency penalty per occurrence, presence penalty once."""

    def __init__(self, prompt_tokens: int, frequency: float, presence: float) -> None:
        self._prompt_tokens, self._frequency, self._presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (1, vocab_size) scores."""
        counts = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def processors(sampling: Sampling, prompt_tokens: int) -> LogitsProcessorList:
    """Return the logits processors of a request, in OpenAI's order."""
    chosen = LogitsProcessorList()
    if sampling.frequency_penalty or sampling.presence_penalty:
        chosen.append(OccurrencePenalty(prompt_tokens, sampling.frequency_penalty, sampling.presence_penalty))
    if sampling.logit_bias:
        chosen.append(LogitBias(sampling.logit_bias))
    return chosen
