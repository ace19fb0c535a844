"""Response objects in OpenAI's format: complete or streamed, for chats and completions."""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from sage.llm.workers.sampling import Piece, TokenScore


class Shape:
    """Builds the response to one request. Subclasses define the format of chats and completions."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, *, with_logprobs: bool) -> None:
        self._model, self._with_logprobs = model, with_logprobs
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._completion_tokens = 0
        self.prompt_tokens = 0

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """Return a complete response from all pieces."""
        choices: dict[int, list[Piece]] = {}
        for piece in pieces:
            choices.setdefault(piece.index, []).append(piece)
            self._completion_tokens += piece.completion_tokens
        made = [
            self._choice(
                index,
                self._content("".join(part.text for part in parts)),
                [score for part in parts for score in part.scores],
                parts[-1].finish_reason,
            )
            for index, parts in choices.items()
        ]
        return self._object(self.kind, made, usage=self._usage())

    def chunks(self, piece: Piece, *, is_first: bool) -> list[dict[str, Any]]:
        """Return the stream chunks of a piece; is_first: it is the first piece of its choice."""
        self._completion_tokens += piece.completion_tokens
        made = []
        if piece.text or piece.scores or is_first:
            delta = self._delta(piece.text, is_first=is_first)
            made.append(self._choice(piece.index, delta, list(piece.scores), None))
        if piece.finish_reason:
            made.append(self._choice(piece.index, self._delta("", is_first=False), [], piece.finish_reason))
        return [self._object(self.chunk_kind, [choice]) for choice in made]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk, which counts the tokens."""
        return self._object(self.chunk_kind, [], usage=self._usage())

    def _choice(
        self, index: int, content: dict[str, Any], scores: list[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(scores) if self._with_logprobs and (scores or finish_reason is None) else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str, *, is_first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        raise NotImplementedError

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self._completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self._completion_tokens, "total_tokens": total,
        }  # fmt: skip

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices, **more
        }  # fmt: skip


class ChatShape(Shape):
    """Answers of a chat."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str, *, is_first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        return {"delta": delta if text or is_first else {}}

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        content = [
            {
                **_named(score.token, score.logprob),
                "top_logprobs": [_named(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Answers of a plain completion."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        return {
            "tokens": [_spelled(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [_by_token(score) for score in scores],
            "text_offset": [score.text_offset for score in scores],
        }


def _by_token(score: TokenScore) -> dict[str, float] | None:
    """Return the most likely tokens and the generated one, as OpenAI does; different tokens may have the same text."""
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(_spelled(token), logprob)
    return found


def _named(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _spelled(token), "logprob": logprob, "bytes": list(token)}


def _spelled(token: bytes) -> str:
    """Return a token as text; an incomplete character is written as bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
