"""Field types for OpenAI's requests, with limits and JSON schemas."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, WithJsonSchema, model_validator

MAX_INPUTS = 2048
_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 1024
_MAX_FIELDS = 100
INT64 = 2**63


def _stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not is_list or not all(isinstance(text, str) and 0 < len(text) <= _MAX_STOP_CHARACTERS for text in texts):
        raise ValueError(
            f"must be a text or a list of up to {_MAX_STOPS} texts; each text must have 1 to "
            f"{_MAX_STOP_CHARACTERS} characters"
        )
    return texts


def _inputs(value: Any) -> Any:
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_INPUTS:
            raise ValueError(f"has {len(value)} inputs; at most {MAX_INPUTS} are allowed")
        if all(isinstance(part, str) for part in value) or all(map(_are_ids, value)):
            return value
    several = f"a list of 1 to {MAX_INPUTS}"
    allowed = f"must be a text, a list of token ids, {several} texts, or {several} lists of token ids"
    if value in ([], [[]]):
        raise ValueError(f"is empty; it {allowed}")
    raise ValueError(allowed)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int and part >= 0 for part in value)


def _tool_choice(value: Any) -> Any:
    match value:
        case "auto" | "none" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}} if len(value) == 2 and len(value["function"]) == 1:
            return ToolChoice("required", name)
    raise ValueError('must be "auto", "none", "required", or {"type": "function", "function": {"name": NAME}}')


_TEXT: dict[str, Any] = {"type": "string"}
_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARACTERS}
_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SEVERAL: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS}

_NAMED: dict[str, Any] = {
    "type": "object", "required": ["type", "function"], "additionalProperties": False, "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "additionalProperties": False, "properties": {"name": _TEXT}},
    },
}  # fmt: skip


class ToolChoice(NamedTuple):
    """Whether the model can or must call tools, and the name of the required tool."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


#: Accepts 5.0 as an integer, because JSON has only one number type.
INTEGRAL = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Name = Annotated[str, Field(min_length=1, max_length=256)]
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
Choice = Annotated[
    InstanceOf[ToolChoice],
    BeforeValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "none", "required"]}, _NAMED, {"type": "null"}]}),
]
LogitBias = dict[
    Annotated[str, Field(pattern="^[0-9]{1,9}$")],
    Annotated[float, Field(ge=-100, le=100)],
]


class Body(BaseModel):
    """A JSON object. Null fields count as absent, and unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _MAX_FIELDS:  # limited, because pydantic builds an error for each unknown field
            raise ValueError(f"must have at most {_MAX_FIELDS} fields")
        return {name: value for name, value in values.items() if value is not None}
