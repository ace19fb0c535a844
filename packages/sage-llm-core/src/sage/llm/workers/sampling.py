"""Types for the sampling parameters of a request, and for the pieces of a streamed answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request.

    If temperature, top_p, top_k, min_p or repetition_penalty is None, the value in the model's
    generation_config.json is used.
    """

    max_tokens: int
    temperature: float | None = None  #: 0 = greedy decoding
    top_p: float | None = None
    top_k: int | None = None  #: 0 or -1: all tokens
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  #: values to add to logits, by token id
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  #: number of most likely tokens to report; None: no log-probabilities
    echo: bool = False  #: whether the answer begins with the prompt


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of one token, computed without temperature and penalties."""

    token: bytes  #: the token's text; the bytes are not valid UTF-8 if the token has only a part of a character
    logprob: float | None  #: natural logarithm; None for the first token of a prompt
    top: tuple[tuple[bytes, float], ...]  #: most likely tokens with log-probabilities, most likely token first
    text_offset: int  #: number of characters in the answer before this token


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer."""

    text: str
    scores: tuple[TokenScore, ...] = ()
    index: int = 0  #: index of the choice that contains the piece
    finish_reason: str | None = None  #: only in the last piece of a choice
    completion_tokens: int = 0  #: number of tokens in the choice; only in the last piece
