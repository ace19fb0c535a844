"""Requests of OpenAI's API. Each field is either supported, limited to its neutral value, or rejected."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from sage.common.errors import ConfigError
from sage.llm.workers.sampling import Sampling

MAX_INPUTS = 2048
_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 1024
_MAX_FIELDS = 100
_INT64 = 2**63


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not is_list or not all(isinstance(text, str) and 0 < len(text) <= _MAX_STOP_CHARACTERS for text in texts):
        raise ValueError(f"must be text or up to {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_CHARACTERS} characters")
    return texts


def _inputs(value: Any) -> Any:
    """Return a list of texts, or a list of lists of token ids."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_INPUTS
    if is_list and (all(isinstance(part, str) for part in value) or all(map(_are_ids, value))):
        return value
    raise ValueError(f"must be text, token ids, or a list of 1 to {MAX_INPUTS} of either")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int and part >= 0 for part in value)


_TEXT: dict[str, Any] = {"type": "string"}
_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARACTERS}
_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SEVERAL: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS}

#: JSON has one kind of number: 5.0 is an integer too.
INTEGRAL = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Inputs = Annotated[
    list[Any],
    BeforeValidator(_inputs),
    WithJsonSchema({"anyOf": [_TEXT, {**_SEVERAL, "items": _TEXT}, _IDS, {**_SEVERAL, "items": _IDS}]}),
]
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "maxItems": _MAX_STOPS, "items": _STOP}, {"type": "null"}]}),
]
LogitBias = dict[
    Annotated[str, Field(pattern="^[0-9]{1,9}$")],
    Annotated[float, Field(ge=-100, le=100)],
]


class Body(BaseModel):
    """A JSON object; null fields count as absent, and unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _MAX_FIELDS:  # each unknown one would cost an error
            raise ValueError(f"must have at most {_MAX_FIELDS} fields")
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Body):
    """OpenAI's stream_options."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The only supported response_format."""

    type: Literal["text"]


class GenerationRequest(Body):
    """Common fields of chats and completions."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), INTEGRAL] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_INT64), INTEGRAL] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[LogitBias, Field(max_length=10_000)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64), INTEGRAL] | None = None
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
    """A part of a message; this engine reads text only."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A function call of the assistant."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    """One call in an assistant's message."""

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
    reasoning: str | None = None  # another name of reasoning_content, as is the next
    thinking: str | None = None
    function_call: FunctionCall | None = None  # the old form of tool_calls
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None  # OpenAI's client sends it back, empty


class Function(Body):
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    """A tool that a model may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(GenerationRequest):
    """OpenAI's request for a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
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
        if self.parallel_tool_calls is False and self.tools:
            raise _refusal("parallel_tool_calls", "cannot be turned off: the model decides how many tools it calls.")
        limit = self.max_completion_tokens or self.max_tokens or default_max_tokens
        return self._sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages with the fields that they have."""
        return [message.model_dump(exclude_none=True, exclude={"annotations"}) for message in self.messages]

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools for the chat template, or None."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]


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
            raise _refusal("max_tokens", "must be at least 1, or 0 with 'echo': true.")
        if self.best_of not in (None, self.n or 1):
            raise _refusal("best_of", "is supported only if it equals n.")
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
