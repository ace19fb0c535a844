"""Build complete and streamed responses to chats and completions, in OpenAI's format."""

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from sage.llm.workers.answer_format import AnswerFormat
from sage.llm.workers.sampling import Piece, TokenScore
from sage.llm.workers.tool_calls import AnswerReader, Call, Part


class Shape:
    """Builds the response to one request."""

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
        """Return the complete response, built from all pieces."""
        choices: dict[int, list[Piece]] = {}
        for piece in pieces:
            choices.setdefault(piece.index, []).append(piece)
            self._completion_tokens += piece.completion_tokens
        made = [
            self._choice(
                index,
                self._content(parts),
                [score for part in parts for score in part.scores],
                self._finish_reason(parts[-1]),
            )
            for index, parts in choices.items()
        ]
        return self._object(self.kind, made, usage=self._usage())

    def chunks(self, piece: Piece, *, is_first: bool) -> list[dict[str, Any]]:
        """Return the stream chunks of a piece.  is_first: whether the piece is the first piece of its choice."""
        self._completion_tokens += piece.completion_tokens
        made = []
        delta = self._delta(piece, is_first=is_first)
        if delta or piece.scores:
            made.append(self._choice(piece.index, delta or self._no_delta(), list(piece.scores), None))
        if reason := self._finish_reason(piece):
            made.append(self._choice(piece.index, self._no_delta(), [], reason))
        return [self._object(self.chunk_kind, [choice]) for choice in made]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk, which contains the token counts."""
        return self._object(self.chunk_kind, [], usage=self._usage())

    def _choice(
        self, index: int, content: dict[str, Any], scores: list[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(scores) if self._with_logprobs and (scores or finish_reason is None) else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """Return the delta of a stream chunk for a piece, or {} if the piece adds nothing."""
        raise NotImplementedError

    def _no_delta(self) -> dict[str, Any]:
        raise NotImplementedError

    def _finish_reason(self, piece: Piece) -> str | None:
        return piece.finish_reason

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
    """Builds the responses of chats."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, *, with_logprobs: bool) -> None:
        super().__init__(model, with_logprobs=with_logprobs)
        self._readers: defaultdict[int, AnswerReader] = defaultdict(lambda: AnswerReader(AnswerFormat(), {}))
        self._calls: Counter[int] = Counter()

    def read_with(self, reader: Callable[[], AnswerReader]) -> None:
        """Set the function that creates a reader for each choice. Call this method once, before the first piece.

        A reader splits the answer of a choice into content, reasoning and tool calls.
        """
        self._readers = defaultdict(reader)

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        parts = [part for piece in pieces for part in self._parts(piece)]
        content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
        calls = [_tool_call(call) for part in parts for call in part.calls]
        message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _delta(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        begun = self._calls[piece.index]
        parts = self._parts(piece)
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {}
        if content := "".join(part.content for part in parts):
            delta["content"] = content
        if reasoning := "".join(part.reasoning for part in parts):
            delta["reasoning_content"] = reasoning
        if calls := [call for part in parts for call in part.calls]:
            delta["tool_calls"] = [{"index": begun + at, **_tool_call(call)} for at, call in enumerate(calls)]
        return {"delta": delta} if delta else {}

    def _no_delta(self) -> dict[str, Any]:
        return {"delta": {}}

    def _finish_reason(self, piece: Piece) -> str | None:
        return "tool_calls" if piece.finish_reason == "stop" and self._calls[piece.index] else piece.finish_reason

    def _parts(self, piece: Piece) -> list[Part]:
        reader = self._readers[piece.index]
        parts = [reader.push(piece.text), *([reader.flush()] if piece.finish_reason else [])]
        self._calls[piece.index] += sum(len(part.calls) for part in parts)
        return parts

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
    """Builds the responses of plain completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _content(self, pieces: list[Piece]) -> dict[str, Any]:
        return {"text": "".join(piece.text for piece in pieces)}

    def _delta(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        return {"text": piece.text} if piece.text or is_first else {}

    def _no_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        return {
            "tokens": [_spelled(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [_by_token(score) for score in scores],
            "text_offset": [score.text_offset for score in scores],
        }


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _by_token(score: TokenScore) -> dict[str, float] | None:
    """Return the log-probabilities of the most likely tokens and of `score.token`. Keys: the tokens as text.

    Returns None for the first token of an echoed prompt.
    """
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(_spelled(token), logprob)
    return found


def _named(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _spelled(token), "logprob": logprob, "bytes": list(token)}


def _spelled(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
