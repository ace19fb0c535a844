"""Serve chats and completions in OpenAI's format: `python -m sage.llm.workers generation --model M --port P`."""

import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage.common.errors import ConfigError, SageError
from sage.llm.workers import server
from sage.llm.workers.answers import Answer
from sage.llm.workers.batch import Batch
from sage.llm.workers.fields import Body
from sage.llm.workers.generator import Generator
from sage.llm.workers.hosting import Hosted, Hosting, add_routes
from sage.llm.workers.jobs import Job, Lane, unless_gone
from sage.llm.workers.requests import ChatRequest, CompletionRequest
from sage.llm.workers.sampling import Piece, Sampling
from sage.llm.workers.shapes import ChatShape, CompletionShape, Shape
from sage.llm.workers.structured import Grammar
from sage.llm.workers.tool_calls import AnswerReader
from sage.llm.workers.voice import Voice, rendered


class Task(NamedTuple):
    """The prompts and the grammar of a request."""

    prompts: list[list[int]]
    grammar: Grammar | None = None  #: grammar of the answers; None: any text


class EventStream(StreamingResponse):
    """A streamed answer. When the stream ends for any reason, the job of the request is cancelled."""

    def __init__(self, events: AsyncIterator[str], job: Job[Piece]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.abandon()


class Engine:
    """Answers generation requests, many at the same time."""

    def __init__(
        self,
        generator: Generator,
        default_max_tokens: int,
        slots: int,
        served_name: str | None,
        cache_tokens: int | None = None,
    ) -> None:
        """slots: maximum number of answers in progress.

        served_name: the base model's name in requests. None: any name is accepted.
        """
        self._generator, self._default_max_tokens = generator, default_max_tokens
        self._slots = slots if generator.is_batching else 1
        self._cache_tokens = cache_tokens
        self._batch = Batch(generator.runner, self._slots, cache_tokens)
        self._tokenization = Lane("Tokenization")
        self.hosting = Hosting(generator, self._batch, served_name)

    def about(self) -> dict[str, Any]:
        """Return the engine's fields for `/health`. Raises SageError if the engine cannot answer requests any more."""
        self._batch.check()
        return {
            "context_tokens": self._generator.context_tokens, "slots": self._slots, "slots_in_use": self._batch.slots_in_use,
            "threads": self._batch.threads, "is_active": self._batch.is_active, "tokens": self.hosting.tokens(),
        }  # fmt: skip

    async def set_threads(self, threads: int) -> None:
        """Change the number of CPU threads after the current forward pass."""
        await self._batch.set_threads(threads)

    def close(self) -> None:
        """End all answers with an error which says that the engine is stopping."""
        self._tokenization.close()
        self._batch.close()

    async def chat(self, request: ChatRequest, connection: Request) -> Response | dict[str, Any]:
        """Answer a chat."""
        sampling = request.sampling(self._default_max_tokens)
        shape = ChatShape(request.model, with_logprobs=bool(request.logprobs))
        return await unless_gone(connection, self._answer(request, sampling, shape, partial(_read_chat, request, shape)))

    async def complete(self, request: CompletionRequest, connection: Request) -> Response | dict[str, Any]:
        """Complete one or more texts."""
        sampling = request.sampling(self._default_max_tokens)
        shape = CompletionShape(request.model, with_logprobs=request.logprobs is not None)
        return await unless_gone(connection, self._answer(request, sampling, shape, partial(_read_texts, request)))

    async def _answer(
        self,
        request: ChatRequest | CompletionRequest,
        sampling: Sampling,
        shape: Shape,
        read: Callable[[Voice], Task],
    ) -> Response | dict[str, Any]:
        hosted = self.hosting.find(request.model)
        hosted.enter()
        job: Job[Piece] = Job(on_finish=hosted.leave)

        def prepare() -> list[Answer]:
            task = read(hosted.voice)
            for prompt in task.prompts:
                param = "messages" if isinstance(shape, ChatShape) else "prompt"
                hosted.voice.check_prompt(prompt, sampling, param)
                self._check_memory(len(prompt), sampling.max_tokens, param)
            shape.prompt_tokens = sum(map(len, task.prompts))
            hosted.prompt_tokens += shape.prompt_tokens
            choices = enumerate(prompt for prompt in task.prompts for _ in range(request.n or 1))
            continues = isinstance(shape, CompletionShape)
            answers = [self._choice(index, prompt, sampling, hosted, job, continues) for index, prompt in choices]
            if task.grammar:
                for answer in answers:
                    answer.chooser.adjustments.append(task.grammar.start())
            return answers

        try:
            answers = await self._tokenization.call(prepare)
            self._batch.submit(job, answers, hosted.adapter)
        except BaseException:
            hosted.leave()
            raise
        try:
            if not request.stream:
                return shape.whole(sorted([piece async for piece in job], key=lambda piece: piece.index))
            first = await anext(job)  # if `anext` raises an error, the client gets an HTTP error status
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return EventStream(_events(first, job, shape, with_usage=with_usage), job)
        except BaseException:
            job.abandon()
            raise

    def _check_memory(self, prompt_tokens: int, max_tokens: int, param: str) -> None:
        """Raise ConfigError if the key/value cache is too small for the prompt and the longest possible answer."""
        answer_tokens = min(max_tokens, self._generator.context_tokens - prompt_tokens)
        if self._cache_tokens and prompt_tokens + answer_tokens > self._cache_tokens:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {prompt_tokens} tokens, and the answer can have {answer_tokens}, but the engine's "
                f"key/value cache has space for only {self._cache_tokens} tokens.",
                hint="Shorten the prompt, or set a smaller max_tokens.",
                param=param,
            )

    def _choice(
        self, index: int, prompt: list[int], sampling: Sampling, hosted: Hosted, job: Job[Piece], continues: bool
    ) -> Answer:
        seed = None if sampling.seed is None else sampling.seed ^ index

        def put(piece: Piece) -> None:
            hosted.completion_tokens += piece.completion_tokens
            job.put(replace(piece, index=index))

        return self._generator.answer(hosted.voice, prompt, replace(sampling, seed=seed), put, continues=continues)


def build(
    name: str,
    dtype: str,
    max_tokens: int,
    slots: int = 16,
    context_tokens: int | None = None,
    served_name: str | None = None,
    cache_tokens: int | None = None,
) -> FastAPI:
    """Load the model and return the server. Raises ModelError if the model cannot be loaded."""
    return create_server(Engine(Generator(name, dtype, context_tokens), max_tokens, slots, served_name, cache_tokens))


class ThreadsRequest(Body):
    """A request to change the number of CPU threads."""

    threads: int = Field(ge=1, le=os.cpu_count() or 1)


def create_server(engine: Engine) -> FastAPI:
    """Return the server for an engine."""
    app = server.create_app("SAGE generation", engine.close, engine.about)
    add_routes(app, engine.hosting)

    @app.post("/v1/chat/completions", response_model=None, responses=server.STREAMED)
    async def chat(request: ChatRequest, connection: Request) -> Response | dict[str, Any]:
        """Answer a chat."""
        return await engine.chat(request, connection)

    @app.post("/v1/threads", responses=server.ANSWERED)
    async def set_threads(request: ThreadsRequest) -> dict[str, Any]:
        """Change the number of CPU threads."""
        await engine.set_threads(request.threads)
        return {"status": "ok"}

    @app.post("/v1/completions", response_model=None, responses=server.STREAMED)
    async def complete(request: CompletionRequest, connection: Request) -> Response | dict[str, Any]:
        """Complete a text."""
        return await engine.complete(request, connection)

    return app


def _read_chat(request: ChatRequest, shape: ChatShape, voice: Voice) -> Task:
    """Return the prompt and grammar of a chat, and give `shape` the function that creates an AnswerReader for each choice.

    Raises ConfigError if the model cannot satisfy the request.
    """
    output = request.output()
    prompt = _chat_prompt(voice, request)
    is_reasoning = voice.ends_in_reasoning(prompt)
    shape.read_with(partial(AnswerReader, voice.answer_format, output.parameters(), is_reasoning=is_reasoning))
    grammar = output.grammar(voice.answer_format, voice.special_tokens, is_reasoning=is_reasoning)
    return Task([prompt], voice.grammars.compile(grammar) if grammar else None)


def _read_texts(request: CompletionRequest, voice: Voice) -> Task:
    return Task([_text_prompt(voice, prompt) for prompt in request.prompt])


def _chat_prompt(voice: Voice, request: ChatRequest) -> list[int]:
    messages, tools = request.conversation(), request.offered_tools()
    voice.check_characters(_characters([messages, tools]), "messages")
    prompt = rendered(lambda: voice.chat_prompt(messages, tools))
    without_tools = rendered(lambda: voice.chat_prompt(messages, None)) if tools else []
    if prompt == without_tools:
        message = "tools: the model's chat template does not support tools."
        raise ConfigError(code="unsupported_value", message=message, hint="Remove 'tools'.", param="tools")
    return prompt


def _text_prompt(voice: Voice, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    voice.check_characters(len(prompt), "prompt")
    return voice.text_prompt(prompt)


async def _events(first: Piece, job: Job[Piece], shape: Shape, *, with_usage: bool) -> AsyncIterator[str]:
    for chunk in shape.chunks(first, is_first=True):
        yield _event(chunk)
    begun = {first.index}
    try:
        async for piece in job:
            for chunk in shape.chunks(piece, is_first=piece.index not in begun):
                yield _event(chunk)
            begun.add(piece.index)
    except SageError as error:
        yield _event(error.body())
        return
    if with_usage:
        yield _event(shape.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(len(key) + _characters(part) for key, part in value.items())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1


def main() -> None:
    """Serve until SIGTERM."""
    options = server.parser()
    options.add_argument("--dtype", default="auto")
    options.add_argument(
        "--max-tokens", type=int, default=1024, help="Maximum tokens of an answer, if the request sets no maximum."
    )
    options.add_argument("--slots", type=int, default=16, help="Maximum number of answers in progress at the same time.")
    options.add_argument("--context-tokens", type=int, help="Context length in tokens. Default: the model's limit.")
    options.add_argument("--cache-tokens", type=int, help="Maximum total tokens of all prompts and answers in progress.")
    options.add_argument("--served-name", help="The model's name in requests. Default: any name is accepted.")
    given = options.parse_args()
    build_it = partial(
        build,
        given.model,
        given.dtype,
        given.max_tokens,
        given.slots,
        given.context_tokens,
        given.served_name,
        given.cache_tokens,
    )
    server.run(build_it, given)
