"""Convert the tokens of an answer to pieces, which are parts of a streamed answer."""

from collections.abc import Callable

from torch import Tensor

from sage.llm.workers.choosing import Chooser
from sage.llm.workers.sampling import Piece, Sampling, TokenScore
from sage.llm.workers.scoring import Scorer
from sage.llm.workers.text import StopStrings, TextDecoder
from sage.llm.workers.voice import Voice


class Answer:
    """The answer for one choice of a request."""

    def __init__(
        self, voice: Voice, prompt: list[int], sampling: Sampling, chooser: Chooser, limit: int,
        put: Callable[[Piece], None], *, continues: bool,
    ) -> None:  # fmt: skip
        """limit: maximum number of tokens of the answer.  put: function that receives the pieces.

        continues: whether the answer continues the text of the prompt, as in a completion.
        """
        self.prompt, self.chooser = prompt, chooser
        self.tokens: list[int] = []
        #: Whether the logits of the whole prompt are needed.
        self.scores_prompt = sampling.echo and sampling.top_logprobs is not None
        self.has_ended = False
        self.limit = limit
        self._sampling, self._put = sampling, put
        self._end_tokens = voice.end_tokens
        self._scorer = Scorer(voice.token_bytes, sampling.top_logprobs or 0)
        self._decoder = (
            TextDecoder(voice.tokenizer, prompt)
            if continues
            else TextDecoder(voice.tokenizer, shown_tokens=voice.shown_tokens)
        )
        self._stops = StopStrings(sampling.stop)
        self._pending: list[TokenScore] = []  #: scores of tokens whose text is not yet returned
        self._characters = 0
        self._echo_decoder = TextDecoder(voice.tokenizer)
        self._echoed, self._echo_scores = "", list[TokenScore]()
        self._before: Tensor | None = None  #: logits for the next token of the prompt

    def begin(self) -> None:
        """Deliver the pieces that need no forward pass: the echoed prompt, and the last piece if `limit` is 0.

        If the scores of the prompt are needed, deliver nothing, because the scores need a forward pass.
        """
        if self._sampling.echo and not self.scores_prompt:
            self._echo("".join(map(self._echo_decoder.push, self.prompt)))
        if not self.limit and not self.scores_prompt:
            self._end("length")

    def read(self, tokens: list[int], logits: Tensor) -> None:
        """Compute the scores of prompt tokens.  logits: (tokens, vocab_size), the logits after each token."""
        for token, after in zip(tokens, logits, strict=True):
            self._echo_scores.append(self._scorer.score(token, self._before, self._echo_decoder.characters))
            self._echoed += self._echo_decoder.push(token)
            self._before = after
        self._before = logits[-1].clone()  # a copy, because a view would keep all logits in memory
        if len(self._echo_scores) == len(self.prompt):
            self._echo(self._echoed)
            if not self.limit:
                self._end("length")

    def add(self, token: int, logits: Tensor) -> None:
        """Add a token of the answer.  logits: (vocab_size,), the logits from which the token was chosen."""
        self.tokens.append(token)
        if token in self._end_tokens:
            self._end("stop")
            return
        if self._sampling.top_logprobs is not None:
            self._pending.append(self._scorer.score(token, logits, self._decoder.characters))
        self._give(self._stops.push(self._decoder.push(token)))
        if self._stops.is_met or len(self.tokens) >= self.limit:
            self._end("length")

    def _echo(self, text: str) -> None:
        text += self._echo_decoder.flush()
        self._put(Piece(text, tuple(self._echo_scores)))
        self._decoder.characters = self._characters = len(text)

    def _end(self, reason: str) -> None:
        self.has_ended = True
        rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
        is_cut = self._stops.is_met
        self._characters += len(rest)
        scores = tuple(score for score in self._pending if not is_cut or score.text_offset < self._characters)
        finish_reason = "stop" if is_cut else reason
        self._put(Piece(rest, scores, finish_reason=finish_reason, completion_tokens=len(self.tokens)))

    def _give(self, text: str) -> None:
        if text:
            self._characters += len(text)
            ready = [score for score in self._pending if score.text_offset < self._characters]
            self._pending = self._pending[len(ready) :]
            self._put(Piece(text, tuple(ready)))
