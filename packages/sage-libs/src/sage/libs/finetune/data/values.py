"""Values of records: JSON as the standard has it, texts, lists, and what is wrong with them."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

#: Messages quote no more of a value: what people train on does not belong into logs.
_SHOWN_LETTERS = 40


class RecordError(ValueError):
    """A record that cannot be trained on; the message names the field, the hint the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


#: Decodes JSON as the standard has it, without NaN and Infinity.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def json_problem(error: ValueError | RecursionError) -> str:
    """Return what a decoder's error says, in words for a person."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def unpacked(value: Any) -> Any:
    """Return what a text holds if it is a JSON list or object, as in a CSV cell; else the value itself.

    Only for fields that are lists or objects by their format: elsewhere such a text is what the model learns.
    """
    if _is_packed(value):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def decoded(text: str, where: str, hint: str) -> Any:
    """Return the value of a JSON text. Raises RecordError."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not valid JSON: {json_problem(error)}.", hint) from error


def _is_packed(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def list_of(value: Any, where: str) -> list[Any]:
    """Return a list, or the list that a JSON text holds. Raises RecordError."""
    if _is_packed(value):
        value = decoded(value, f"'{where}'", "Write it as JSON, with double quotes.")
    if not isinstance(value, list):
        raise RecordError(f"'{where}' must be a list, found {kind_of(value)}.")
    return value


def text_of(value: Any, where: str) -> str:
    """Return a text; a list of OpenAI's text parts is one too. Raises RecordError that names the place."""
    if type(value) is str and value.isascii():
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        value = "".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise RecordError(f"{where} must be text, found {kind_of(value)}.")
    return encodable(value, where)


def _part_text(part: Mapping[str, Any], where: str) -> str:
    if part["type"] != "text":
        raise RecordError(f"{where} is of type {shown(part['type'])}: this trains text only.", "Remove the record.")
    if not isinstance(part.get("text"), str):
        raise RecordError(f"{where}.text must be text, found {kind_of(part.get('text'))}.")
    return str(part["text"])


def encodable(text: str, where: str) -> str:
    """Return a text that has no half of a character (a lone surrogate). Raises RecordError."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RecordError(f"{where} holds half a character, {half}.", "Write the whole character.") from error
    return text


def check_encodable(value: Any, where: str) -> None:
    """Raise RecordError if a text anywhere inside holds half of a character."""
    encodable(json.dumps(value, ensure_ascii=False, default=str), where)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def printable(name: Any) -> str:
    """Return a field's name as it can be printed anywhere, not too long."""
    text = str(name).encode(errors="replace").decode()
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def shown(value: Any) -> str:
    """Return a value as JSON, or what it is in words if that is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_LETTERS else kind_of(value)


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {type(None): "nothing", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
