"""Adjust logits before a token is chosen: repetition, frequency and presence penalties, and logit_bias."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sage.llm.workers.sampling import Sampling

#: A function that receives the answer's tokens and the logits, and returns the adjusted logits. The logits have the shape
#: (vocab_size,). The function can change the given logits in place.
Adjustment = Callable[[list[int], Tensor], Tensor]


class RepetitionPenalty:
    """Penalizes tokens of the prompt and the answer, as in the CTRL paper.

    A positive logit of such a token is divided by `factor`. A negative logit is multiplied by `factor`.
    """

    def __init__(self, prompt: Iterable[int], factor: float) -> None:
        self._seen, self._factor = set(prompt), factor

    def __call__(self, answer: list[int], logits: Tensor) -> Tensor:
        """Return the adjusted logits."""
        self._seen.update(answer[-1:])
        tokens = torch.tensor(list(self._seen), device=logits.device)
        values = logits[tokens]
        logits[tokens] = torch.where(values < 0, values * self._factor, values / self._factor)
        return logits


class OccurrencePenalty:
    """Reduces the logit of each token in the answer by `presence`, and by `frequency` for each occurrence of the token."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._counts = Counter[int]()
        self._frequency, self._presence = frequency, presence

    def __call__(self, answer: list[int], logits: Tensor) -> Tensor:
        """Return the adjusted logits."""
        self._counts.update(answer[-1:])
        penalties = [self._frequency * count + self._presence for count in self._counts.values()]
        logits[list(self._counts)] -= logits.new_tensor(penalties)
        return logits


class LogitBias:
    """Adds biases to the logits of selected tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._values = list(biases), torch.tensor(list(biases.values()))

    def __call__(self, _answer: list[int], logits: Tensor) -> Tensor:
        """Return the adjusted logits."""
        logits[self._tokens] += self._values.to(logits)
        return logits


def adjustments(sampling: Sampling, prompt: list[int], repetition_penalty: float) -> list[Adjustment]:
    """Return the adjustments for a request, in the order of their application."""
    chosen: list[Adjustment] = []
    if repetition_penalty != 1:
        chosen.append(RepetitionPenalty(prompt, repetition_penalty))
    if sampling.frequency_penalty or sampling.presence_penalty:
        chosen.append(OccurrencePenalty(sampling.frequency_penalty, sampling.presence_penalty))
    if sampling.logit_bias:
        chosen.append(LogitBias(sampling.logit_bias))
    return chosen
