"""Restrict answers to a grammar, token by token, with llguidance."""

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage.common.errors import ConfigError, SageError

#: Compiled grammars that are kept; one takes some hundred kilobytes.
_KEPT_GRAMMARS = 64


class Grammars:
    """The grammars of a model's tokenizer, compiled once each. Its methods may be called by any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: list[int]) -> None:
        """vocab_size: of the logits; end_tokens: that end an answer, allowed where the grammar may end."""
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self._compiled = lru_cache(_KEPT_GRAMMARS)(self._compile)
        self._known_tokens: Any = None
        self._lock = threading.Lock()

    def check(self, grammar: str) -> None:
        """Compile a grammar. Raises ConfigError with the compiler's reason, for example a keyword that it does not know."""
        with self._lock:
            self._compiled(grammar)

    def start(self, grammar: str, begin_after: int | None = None) -> "Constraint":
        """Return the state of a new answer. begin_after: token after which the grammar begins, e.g. the end of reasoning."""
        with self._lock:
            return Constraint(self._compiled(grammar).deep_copy(), self._end_tokens, begin_after)

    def _compile(self, grammar: str) -> Any:
        import llguidance  # few servers need it
        from llguidance.hf import from_tokenizer

        if self._known_tokens is None:
            self._known_tokens = from_tokenizer(self._tokenizer, self._vocab_size, self._end_tokens[0])
        matcher = llguidance.LLMatcher(self._known_tokens, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise ConfigError(code="unsupported_value", message=f"The schema is not supported: {matcher.get_error()}")
        return matcher


class Constraint:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: Any, end_tokens: list[int], begin_after: int | None) -> None:
        self._matcher, self._end_tokens, self._begin_after = matcher, end_tokens, begin_after

    def apply(self, logits: Tensor) -> None:
        """Set the logits of all tokens that the grammar does not allow next to -inf; logits: (vocab_size,)."""
        if self._begin_after is not None:
            return
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        if self._matcher.is_error():
            raise SageError(code="grammar_failed", message="The answer could not be restricted to the schema.")
        allowed[self._end_tokens] |= allowed[self._end_tokens[0]]
        logits.masked_fill_(~allowed[: len(logits)].to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Add a token to the answer."""
        if self._begin_after is not None:
            self._begin_after = None if token == self._begin_after else self._begin_after
        elif token not in self._end_tokens:
            self._matcher.consume_token(token)
