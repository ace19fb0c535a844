"""The request bodies of OpenAI's API. Unknown fields are rejected."""

from typing import Annotated, Any, Literal

from pydantic import Field

from sage.common.errors import ConfigError
from sage.llm.workers.fields import (
    INT64,
    INTEGRAL,
    MAX_INPUTS,
    Body,
    Choice,
    Inputs,
    LogitBias,
    ModelName,
    Name,
    Penalty,
    Stops,
    ToolChoice,
)
from sage.llm.workers.output import Output
from sage.llm.workers.sampling import Sampling


class StreamOptions(Body):
    """The field `stream_options` of OpenAI's API."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A JSON schema that an answer must match."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """The field `response_format` of OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer, or None if any text is allowed.

        Raises ConfigError if fields contradict each other.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refusal("response_format", "'json_schema' must be set if and only if 'type' is 'json_schema'.")
        if self.json_schema:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class GenerationRequest(Body):
    """Fields that requests for chat completions and for completions have in common."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64), INTEGRAL] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[LogitBias, Field(max_length=10_000)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), INTEGRAL] | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=128), INTEGRAL] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def _sampling(self, max_tokens: int, top_logprobs: int | None, *, echo: bool = False) -> Sampling:
        if self.stream_options and not self.stream:
            raise _refusal("stream_options", "is allowed only with 'stream': true.")
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            stop=tuple(self.stop or ()),
            top_logprobs=top_logprobs,
            echo=echo,
        )


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A function call of the assistant."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    """A tool call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # `reasoning` and `thinking` are other names for reasoning_content
    thinking: str | None = None
    function_call: FunctionCall | None = None  # old form of tool_calls
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None  # OpenAI's client sends an empty list


class Function(Body):
    """A function that a model can call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that a model can call."""

    type: Literal["function"]
    function: Function


class ChatRequest(GenerationRequest):
    """OpenAI's request for a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, default_max_tokens: int) -> Sampling:
        """Return the sampling parameters. Raises ConfigError if fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "is allowed only with 'logprobs': true.")
        limit = self.max_completion_tokens or self.max_tokens or default_max_tokens
        return self._sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as dicts, without fields that are not set."""
        return [message.model_dump(exclude_none=True, exclude={"annotations"}) for message in self.messages]

    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools for the chat template, or [] if the model must not call tools."""
        if self.tool_choice and self.tool_choice.mode == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]

    def output(self) -> Output:
        """Return the required form of the answer. Raises ConfigError if fields contradict each other."""
        tools, choice = self.offered_tools(), self.tool_choice or ToolChoice()
        functions = [tool["function"] for tool in tools]
        if choice.mode == "required" and not functions:
            raise _refusal("tool_choice", "is allowed only with 'tools'.")
        if choice.name and choice.name not in [function["name"] for function in functions]:
            raise _refusal("tool_choice", f"{choice.name!r} is not one of the tools.")
        return Output(
            schema=self.response_format.schema_of_answer() if self.response_format else None,
            functions=[function for function in functions if choice.name in (None, function["name"])],
            must_call=choice.mode == "required",
            may_call_several=self.parallel_tool_calls is not False and choice.name is None,
        )


class CompletionRequest(GenerationRequest):
    """OpenAI's request for a completion."""

    prompt: Inputs
    max_tokens: Annotated[int, Field(ge=0), INTEGRAL] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = None
    best_of: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    suffix: Literal[""] | None = None

    def sampling(self, default_max_tokens: int) -> Sampling:
        """Return the sampling parameters. Raises ConfigError if fields contradict each other."""
        if self.max_tokens == 0 and not self.echo:
            raise _refusal("max_tokens", "must be at least 1; the value 0 is allowed only with 'echo': true.")
        if self.best_of not in (None, self.n or 1):
            raise _refusal("best_of", "must be equal to 'n'.")
        answers = len(self.prompt) * (self.n or 1)
        if answers > MAX_INPUTS:
            raise _refusal("n", f"{answers} answers are requested (n for each prompt); at most {MAX_INPUTS} are allowed.")
        given = (self.max_completion_tokens, self.max_tokens, default_max_tokens)
        limit = next(tokens for tokens in given if tokens is not None)
        return self._sampling(limit, self.logprobs, echo=bool(self.echo))


class EmbeddingRequest(Body):
    """OpenAI's request for embeddings."""

    model: ModelName
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    user: str | None = None


def _refusal(param: str, problem: str) -> ConfigError:
    return ConfigError(code="invalid_value", message=f"{param}: {problem}", param=param)
