"""Compute log-probabilities of tokens in fp32, before temperature, penalties and filters are applied."""

import torch
from torch import Tensor

from sage.llm.workers.sampling import TokenScore
from sage.llm.workers.text import TokenBytes

#: Log-probability to return for tokens with probability 0, because JSON has no infinity. OpenAI's API uses the same value.
_IMPOSSIBLE = -9999.0


class Scorer:
    """Converts logits to TokenScores."""

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._bytes, self._top = token_bytes, top

    def score(self, token: int, logits: Tensor | None, text_offset: int) -> TokenScore:
        """Return the score of `token`.  logits: shape (vocab_size,); None for the first token of a prompt."""
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
    return max(_IMPOSSIBLE, value)  # this order of arguments also replaces NaN
