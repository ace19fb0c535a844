"""`python -m sage.llm.workers.generation --model M --port P`: chats and completions in OpenAI's shapes."""

import asyncio
import json
import secrets
import time
from collections.abc import Generator as Pieces
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage.common.errors import ConfigError, SageError
from sage.llm.workers import server
from sage.llm.workers.generator import Answer, Generator, Sampling


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What chats and completions have in common; fields that we do not know are ignored, as OpenAI's are new at times."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    def sampling(self, default_max_tokens: int) -> Sampling:
        """Return how to sample. Raises ConfigError for what this server cannot do, rather than leave it undone."""
        for name, is_asked in (
            ("n", self.n != 1),
            ("logprobs", bool(self.logprobs)),
            ("frequency_penalty", bool(self.frequency_penalty)),
            ("presence_penalty", bool(self.presence_penalty)),
        ):
            if is_asked:
                raise ConfigError(
                    code="unsupported_value",
                    message=f"{name}: this engine's backend (transformers) does not support it.",
                    hint="Leave it away.",
                    param=name,
                )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        limit = self.max_completion_tokens or self.max_tokens or default_max_tokens
        return Sampling(limit, self.temperature, self.top_p, self.seed, stop)


class ChatRequest(GenerationRequest):
    """OpenAI's request for a chat completion."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None


class CompletionRequest(GenerationRequest):
    """OpenAI's request for a completion."""

    prompt: str


class Shape:
    """The fields of one answer's objects: `chat` or plain."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model, self.chat = model, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """Return the answer in one piece."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._object("chat.completion" if self.chat else "text_completion", [choice], usage=_usage(answer))

    def chunk(self, text: str | None, finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
        """Return one piece of a streamed answer."""
        if text is not None:
            delta["content"] = text
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the last piece, which counts the tokens."""
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [], usage=_usage(answer))

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip


class EventStream(StreamingResponse):
    """A streamed answer; gives back what it holds however it ends. Who hangs up leaves its pieces where they are."""

    def __init__(self, pieces: Pieces[str], held: AsyncExitStack) -> None:
        super().__init__(pieces, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces."""
        async with self._held:
            await super().__call__(scope, receive, send)


def build(name: str, dtype: str, max_tokens: int) -> FastAPI:
    """Load the model and return the server. Raises ModelError."""
    generator = Generator(name, dtype)
    app = server.create_app()
    # Waited for in the event loop: waiting in threads would leave none for who has the turn.
    turn = asyncio.Lock()

    async def answer_to(
        request: GenerationRequest, prompt: list[int], connection: Request, *, chat: bool
    ) -> Response | dict[str, Any]:
        answer, shape = Answer(len(prompt)), Shape(request.model, chat=chat)
        pieces = generator.generate(prompt, request.sampling(max_tokens), answer)
        async with AsyncExitStack() as held:
            await held.enter_async_context(turn)
            # Garbage collection would end the generation too, but at its own time.
            held.push_async_callback(run_in_threadpool, pieces.close)
            if request.stream:
                # What is wrong with the request is told by a status, not inside a stream.
                first = await run_in_threadpool(next, pieces, "")
                with_usage = bool(request.stream_options and request.stream_options.include_usage)
                return EventStream(_stream(first, pieces, shape, answer, with_usage), held.pop_all())
            text = ""
            async for piece in iterate_in_threadpool(pieces):
                text += piece
                if await connection.is_disconnected():
                    break
        return shape.whole(text, answer)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest, connection: Request) -> Response | dict[str, Any]:
        prompt = generator.chat_prompt(request.messages, request.tools)
        return await answer_to(request, prompt, connection, chat=True)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: CompletionRequest, connection: Request) -> Response | dict[str, Any]:
        return await answer_to(request, generator.text_prompt(request.prompt), connection, chat=False)

    return app


def _stream(first: str, pieces: Pieces[str], shape: Shape, answer: Answer, with_usage: bool) -> Pieces[str]:
    if shape.chat:
        yield _sse(shape.chunk(first, role="assistant"))
    else:
        yield _sse(shape.chunk(first))
    try:
        for piece in pieces:
            if piece:
                yield _sse(shape.chunk(piece))
    except SageError as error:
        body = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
        yield _sse({"error": body})
        return
    yield _sse(shape.chunk(None, answer.finish_reason))
    if with_usage:
        yield _sse(shape.usage_chunk(answer))
    yield "data: [DONE]\n\n"


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


if __name__ == "__main__":
    options = server.parser()
    options.add_argument("--dtype", default="auto")
    options.add_argument("--max-tokens", type=int, default=1024)
    arguments = options.parse_args()
    server.run(lambda: build(arguments.model, arguments.dtype, arguments.max_tokens), arguments.port)
