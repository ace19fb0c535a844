"""`python -m sage.llm.workers.generation --model M --port P`: chats and completions in OpenAI's shapes."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage.common.errors import ConfigError, SageError
from sage.llm.workers import server
from sage.llm.workers.generator import Generator, rendered
from sage.llm.workers.jobs import Job, Lane, unless_gone
from sage.llm.workers.requests import ChatRequest, CompletionRequest
from sage.llm.workers.sampling import Piece, Sampling
from sage.llm.workers.shapes import ChatShape, CompletionShape, Shape


class EventStream(StreamingResponse):
    """A streamed answer; its work ends with it, however it ends."""

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
    """Answers requests, one at a time, in the order in which they come."""

    def __init__(self, generator: Generator, default_max_tokens: int) -> None:
        self._generator, self._default_max_tokens = generator, default_max_tokens
        self._lane = Lane("Generation")
        self._tokenising = Lane("Tokenising")

    def close(self) -> None:
        """End all answers, each with an error that tells why."""
        self._tokenising.close()
        self._lane.close()

    async def chat(self, request: ChatRequest, connection: Request) -> Response | dict[str, Any]:
        """Answer a chat."""
        sampling = request.sampling(self._default_max_tokens)
        shape = ChatShape(request.model, with_logprobs=bool(request.logprobs))
        return await unless_gone(connection, self._answer(request, sampling, shape, lambda: [self._chat_prompt(request)]))

    async def complete(self, request: CompletionRequest, connection: Request) -> Response | dict[str, Any]:
        """Complete one text or several."""
        sampling = request.sampling(self._default_max_tokens)
        shape = CompletionShape(request.model, with_logprobs=request.logprobs is not None)
        encode = lambda: [self._text_prompt(prompt) for prompt in request.prompt]  # noqa: E731
        return await unless_gone(connection, self._answer(request, sampling, shape, encode))

    async def _answer(
        self,
        request: ChatRequest | CompletionRequest,
        sampling: Sampling,
        shape: Shape,
        encode: Callable[[], list[list[int]]],
    ) -> Response | dict[str, Any]:
        prompts = await self._tokenising.call(encode)
        for prompt in prompts:
            self._generator.check_prompt(prompt, sampling, "messages" if isinstance(shape, ChatShape) else "prompt")
        shape.prompt_tokens = sum(map(len, prompts))
        choices = [prompt for prompt in prompts for _ in range(request.n or 1)]
        continues = isinstance(shape, CompletionShape)
        job: Job[Piece] = self._lane.submit(lambda job: self._generate(choices, sampling, continues, job))
        try:
            if not request.stream:
                return shape.whole([piece async for piece in job])
            first = await anext(job)  # what is wrong is told by a status, not inside a stream
            with_usage = bool(request.stream_options and request.stream_options.include_usage)
            return EventStream(_events(first, job, shape, with_usage=with_usage), job)
        except BaseException:
            job.abandon()
            raise

    def _generate(self, prompts: list[list[int]], sampling: Sampling, continues: bool, job: Job[Piece]) -> None:
        for index, prompt in enumerate(prompts):
            seed = None if sampling.seed is None else sampling.seed ^ index
            put = lambda piece, index=index: job.put(replace(piece, index=index))  # noqa: E731
            self._generator.generate(prompt, replace(sampling, seed=seed), continues=continues, put=put, gone=job.gone)

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        messages, tools = request.conversation(), request.offered_tools()
        self._generator.check_characters(_characters([messages, tools]), "messages")
        prompt = rendered(lambda: self._generator.chat_prompt(messages, tools))
        without_tools = rendered(lambda: self._generator.chat_prompt(messages, None)) if tools else []
        if prompt == without_tools:
            message = "tools: the model's chat template does not tell the model of tools."
            raise ConfigError(code="unsupported_value", message=message, hint="Remove it.", param="tools")
        return prompt

    def _text_prompt(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        self._generator.check_characters(len(prompt), "prompt")
        return self._generator.text_prompt(prompt)


def build(name: str, dtype: str, max_tokens: int) -> FastAPI:
    """Load the model and return the server. Raises ModelError."""
    engine = Engine(Generator(name, dtype), max_tokens)
    app = server.create_app("SAGE generation", engine.close)

    @app.post("/v1/chat/completions", response_model=None, responses=server.STREAMED)
    async def chat(request: ChatRequest, connection: Request) -> Response | dict[str, Any]:
        """Answer a chat."""
        return await engine.chat(request, connection)

    @app.post("/v1/completions", response_model=None, responses=server.STREAMED)
    async def complete(request: CompletionRequest, connection: Request) -> Response | dict[str, Any]:
        """Complete a text."""
        return await engine.complete(request, connection)

    return app


async def _events(first: Piece, job: Job[Piece], shape: Shape, *, with_usage: bool) -> AsyncIterator[str]:
    for chunk in shape.chunks(first, is_first=True):
        yield _event(chunk)
    index = first.index
    try:
        async for piece in job:
            for chunk in shape.chunks(piece, is_first=piece.index != index):
                yield _event(chunk)
            index = piece.index
    except SageError as error:
        yield _event(error.body())
        return
    if with_usage:
        yield _event(shape.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _characters(value: Any) -> int:
    """Return how many characters of text a JSON value holds; every message counts for one at least."""
    if isinstance(value, dict):
        return 1 + sum(len(key) + _characters(part) for key, part in value.items())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1


if __name__ == "__main__":
    options = server.parser()
    options.add_argument("--dtype", default="auto")
    options.add_argument("--max-tokens", type=int, default=1024)
    arguments = options.parse_args()
    server.run(lambda: build(arguments.model, arguments.dtype, arguments.max_tokens), arguments)
