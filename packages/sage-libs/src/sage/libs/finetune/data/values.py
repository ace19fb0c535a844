"""Check and convert values of records: standard JSON, texts, lists.

Functions with the argument `where` raise RecordError if the value is invalid.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

#: Maximum number of characters of a value in a message, so that logs contain only short parts of the training data.
_SHOWN_LETTERS = 40


class RecordError(ValueError):
    """Raised if a record cannot be trained on."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


#: Decodes standard JSON, without NaN and Infinity.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def json_problem(error: ValueError | RecursionError) -> str:
    """Return a short description of an error that DECODER raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "the value is nested too deeply" if isinstance(error, RecursionError) else str(error)


def unpacked(value: Any) -> Any:
    """Decode a JSON text that contains a list or an object, for example from a CSV cell. Return any other value unchanged.

    Use this function only for fields that must be lists or objects. In other fields, JSON text is text to train on.
    """
    if _is_packed(value):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def decoded(text: str, where: str, hint: str) -> Any:
    """Decode a JSON text."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not valid JSON: {json_problem(error)}.", hint) from error


def _is_packed(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def list_of(value: Any, where: str) -> list[Any]:
    """Return `value` if it is a list. If `value` is the JSON text of a list, decode it."""
    if _is_packed(value):
        value = decoded(value, f"'{where}'", "Write the list as JSON, with double quotes.")
    if not isinstance(value, list):
        raise RecordError(f"'{where}' must be a list, found {kind_of(value)}.")
    return value


def text_of(value: Any, where: str) -> str:
    """Return a text unchanged, or join a list of text parts in OpenAI's format."""
    if type(value) is str and value.isascii():
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        value = "".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(value))
    if not isinstance(value, str):
        raise RecordError(f"{where} must be text, found {kind_of(value)}.")
    return encodable(value, where)


def _part_text(part: Mapping[str, Any], where: str) -> str:
    if part["type"] != "text":
        raise RecordError(f"{where} has type {shown(part['type'])}: only text can be trained on.", "Remove the record.")
    if not isinstance(part.get("text"), str):
        raise RecordError(f"{where}.text must be text, found {kind_of(part.get('text'))}.")
    return str(part["text"])


def encodable(text: str, where: str) -> str:
    """Return a text unchanged. Raises RecordError if the text contains a lone surrogate (half a character)."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RecordError(f"{where} has an incomplete character (lone surrogate {half}).", "Fix the text.") from error
    return text


def check_encodable(value: Any, where: str) -> None:
    """Raise RecordError if any text inside a value contains a lone surrogate."""
    encodable(json.dumps(value, ensure_ascii=False, default=str), where)


def without_nulls(value: Any) -> Any:
    """Return a copy of a JSON value. All fields that are null are removed from objects, including nested objects."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def printable(name: Any) -> str:
    """Return a field name for a message: shortened, and without lone surrogates."""
    text = str(name).encode(errors="replace").decode()
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def shown(value: Any) -> str:
    """Return a value as JSON, or its kind (such as `a list`) if the JSON is longer than 40 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_LETTERS else kind_of(value)


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words."""
    names = {type(None): "nothing", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
