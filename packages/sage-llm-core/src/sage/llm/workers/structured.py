"""Use llguidance to restrict the tokens of answers to a grammar."""

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage.common.errors import ConfigError

_KEPT_GRAMMARS = 64
_ERROR = re.compile(
    r"at (?P<line>\d+)\(\d+\): (?:failed to compile JSON schema: )?(?P<reason>.*?)(?=\n +1 \| |$)", re.DOTALL
)


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> "Constraint":
        """Return a constraint for a new answer, with the parser at the start of the grammar."""
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """Restricts an answer to the tokens that its grammar allows."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._read_tokens = matcher, 0

    def __call__(self, answer: list[int], logits: Tensor) -> Tensor:
        """Return the logits with -inf for tokens that the grammar does not allow next.  answer: the tokens so far."""
        self._matcher.consume_tokens(answer[self._read_tokens :])
        self._read_tokens = len(answer)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        if self._matcher.is_error():  # the grammar exceeds a limit of the parser
            raise ConfigError(code="unsupported_value", message="The JSON schema is too complex to be enforced.")
        return logits.masked_fill(~allowed[: len(logits)].to(logits.device), -torch.inf)


class Grammars:
    """Compiles grammars for a model and caches the results. Each instance must be used in only one thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: list[int]) -> None:
        """vocab_size: number of logits.  end_tokens: tokens that end an answer, allowed only at the end of the grammar."""
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self._vocabulary: Any = None
        self.compile = lru_cache(_KEPT_GRAMMARS)(self._compile)

    def _compile(self, text: str) -> Grammar:
        """Compile a grammar from `Output.grammar`. Raises ConfigError if a part of the schema is not supported."""
        import llguidance  # imported only if a request needs it, because the import takes time
        from llguidance.hf import from_tokenizer

        if self._vocabulary is None:
            self._vocabulary = from_tokenizer(self._tokenizer, self._vocab_size, self._end_tokens or None)
        matcher = llguidance.LLMatcher(self._vocabulary, llguidance.LLMatcher.grammar_from_lark(text), log_level=0)
        probe = matcher.deep_copy()
        if not matcher.is_error():
            probe.compute_logit_bias()  # fails if resolving the references in the schema never ends
        if probe.is_error():
            raise _unsupported(probe.get_error(), text)
        return Grammar(matcher)


def _unsupported(error: str, grammar: str) -> ConfigError:
    lines = grammar.splitlines()
    if found := _ERROR.match(error):
        reason = " ".join(found["reason"].split()).partition(". ")[0].rstrip(".")
        lines = [lines[int(found["line"]) - 1]]
    else:
        reason = "no JSON matches the schema"
    param = "response_format" if any(line.startswith("json:") for line in lines) else "tools"
    message = f"{param}: the JSON schema cannot be enforced: {reason}."
    return ConfigError(code="unsupported_value", message=message, param=param)
