"""Choose the next token of an answer from the logits, greedily or by sampling. Each answer has its own random generator."""

from typing import Any

import torch
from torch import Tensor

from sage.llm.workers.penalties import Adjustment, adjustments
from sage.llm.workers.sampling import Sampling

#: If the temperature is below this value, decoding is greedy, because logits divided by the temperature could overflow.
_GREEDY_BELOW = 1e-5
#: The top_p nucleus is first searched among this number of most likely tokens, to avoid sorting all tokens.
_NUCLEUS_TOKENS = 256


class Chooser:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, configured: Any, prompt: list[int]) -> None:
        """configured: the model's generation_config, used for parameters that the request omits."""

        def value(name: str, default: float) -> Any:
            values = (getattr(sampling, name), getattr(configured, name, None), default)
            return next(value for value in values if value is not None)

        self._temperature: float = value("temperature", 1.0)
        self._top_k: int = value("top_k", 0)
        self._top_p: float = value("top_p", 1.0)
        self._min_p: float = value("min_p", 0.0)
        #: Functions that adjust the logits. More functions can be added before the first token, for example for a grammar.
        self.adjustments: list[Adjustment] = adjustments(sampling, prompt, value("repetition_penalty", 1.0))
        self._is_greedy = self._temperature < _GREEDY_BELOW
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def takes_the_best(self) -> bool:
        """Whether the token with the largest unadjusted logit is always chosen."""
        return self._is_greedy and not self.adjustments

    def choose(self, answer: list[int], logits: Tensor) -> int:
        """Return the next token.  answer: the previous tokens of the answer.  logits: (vocab_size,); not modified."""
        if self.adjustments:
            logits = logits.to(torch.float32, copy=True)  # in bf16, rounding could remove small penalties
            for adjust in self.adjustments:
                logits = adjust(answer, logits)
        return int(logits.argmax()) if self._is_greedy else self._sample(logits.float() / self._temperature)

    def _sample(self, logits: Tensor) -> int:
        tokens: Tensor | None = None  #: token ids of the probabilities; None: all tokens, in the order of their ids
        if 0 < self._top_k < len(logits):
            logits, tokens = logits.topk(self._top_k)
        probabilities = logits.softmax(-1)
        if self._top_p < 1:
            probabilities, chosen = _nucleus(probabilities, self._top_p)
            tokens = chosen if tokens is None else tokens[chosen]
        if self._min_p:
            probabilities = probabilities * (probabilities >= self._min_p * probabilities.max())
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        point = float(torch.rand((), generator=self._random, dtype=torch.float64)) * float(sums[-1])
        at = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
        return at if tokens is None else int(tokens[at])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities and ids of the smallest set of most likely tokens whose total probability reaches `top_p`."""
    count = _NUCLEUS_TOKENS
    while True:
        best, tokens = probabilities.topk(min(count, len(probabilities)))
        before = best.cumsum(-1) - best
        if before[-1] >= top_p or len(best) == len(probabilities):
            is_in = before < top_p
            is_in[0] = True
            return best[is_in], tokens[is_in]
        count *= 8
