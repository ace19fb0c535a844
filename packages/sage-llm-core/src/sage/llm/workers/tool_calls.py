"""Find tool calls and reasoning in an answer, while the answer is generated or when it is complete."""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from sage.llm.workers.answer_format import AnswerFormat

#: Calls of Qwen3-Coder and Qwen3.5: `<function=NAME><parameter=KEY>VALUE</parameter></function>`.
_XML_CALL = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
#: Calls of Mistral models since 2025: `NAME[ARGS]{...}`, in some versions with `[CALL_ID]...` before `[ARGS]`.
_NAMED_CALL = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\](.*)", re.DOTALL)
#: Length of call ids. Mistral's templates require nine letters or digits; other templates accept any id.
_ID_CHARACTERS = 9


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
Functions = Mapping[str, Mapping[str, Any]]  # keys: function names; values: JSON schemas of the parameters


class Call(NamedTuple):
    """A call of a function."""

    name: str
    arguments: str  #: a JSON object
    id: str = ""


class Part(NamedTuple):
    """A part of an answer, split into content, reasoning and calls."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


def calls_in(text: str, functions: Functions) -> tuple[Call, ...]:
    """Return the calls in a text. If a call is invalid or its function is not in `functions`, return ()."""
    if _XML_CALL.search(text):
        found = [
            (name.strip(), _xml_arguments(body, functions.get(name.strip(), {}))) for name, body in _XML_CALL.findall(text)
        ]
    elif named := _NAMED_CALL.fullmatch(text):
        found = [(named[1], value) for value in _json_values(named[2])]
    else:
        found = [
            _name_and_arguments(item)
            for value in _json_values(text)
            for item in (value if isinstance(value, list) else [value])
        ]
    if not all(name in functions and isinstance(arguments, dict) for name, arguments in found):
        return ()
    return tuple(
        Call(name, _json_text(arguments), secrets.token_hex(_ID_CHARACTERS)[:_ID_CHARACTERS]) for name, arguments in found
    )


def _json_text(arguments: Any) -> str:
    """Return a value as JSON. Unicode escapes are used only if the value has a lone surrogate, which UTF-8 cannot encode."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


def _json_values(text: str) -> list[Any]:
    """Return the JSON values in a text, or [] if the text contains anything except JSON values, `;`, `,` and whitespace."""
    values, at = [], 0
    try:
        while rest := text[at:].lstrip(" \t\r\n;,"):
            value, length = _DECODER.raw_decode(rest)
            values.append(value)
            at = len(text) - len(rest) + length
    except (ValueError, RecursionError):
        return []
    return values


def _name_and_arguments(item: Any) -> tuple[Any, Any]:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None, None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        parsed = _json_values(arguments)
        arguments = parsed[0] if len(parsed) == 1 else None
    return item["name"], arguments


def _xml_arguments(text: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    properties = parameters.get("properties")
    arguments = {}
    for key, value in _XML_ARGUMENT.findall(text):
        schema = properties.get(key) if isinstance(properties, dict) else None
        is_text = not isinstance(schema, dict) or schema.get("type", "string") == "string"
        values = [] if is_text else _json_values(value)
        arguments[key] = values[0] if len(values) == 1 else value
    return arguments


class AnswerReader:
    """Splits an answer into content, reasoning and tool calls, piece by piece.

    Text that begins like a call but is not a valid call is returned as content.
    """

    def __init__(self, answer_format: AnswerFormat, functions: Functions, *, is_reasoning: bool = False) -> None:
        """functions: functions that the model may call.  is_reasoning: whether the prompt ends inside the reasoning."""
        self._format = answer_format
        self._functions = functions if answer_format.call_open is not None else {}
        self._held = ""  #: text that is not returned yet, because this text can be part of a marker or of a call
        self._spaces = ""  #: whitespace that is returned only if more text of the same kind follows
        self._is_trimming, self._is_end, self._has_content, self._has_called = is_reasoning, False, False, False
        self._parts: list[Part] = []
        #: A method that processes the next part of the buffered text, and returns whether another part can be processed.
        self._step = self._reasoning if is_reasoning else self._beginning if answer_format.think_open else self._content

    def push(self, text: str) -> Part:
        """Add a piece of the answer. Return complete calls, and the text that is now known to be content or reasoning."""
        self._held += text
        while self._step():
            pass
        made, self._parts = self._parts, []
        return Part(
            "".join(part.content for part in made),
            "".join(part.reasoning for part in made),
            tuple(call for part in made for call in part.calls),
        )

    def flush(self) -> Part:
        """Return the remaining text and calls at the end of the answer."""
        self._is_end = True
        return self.push("")

    def _beginning(self) -> bool:
        marker, text = self._format.think_open, self._held.lstrip()
        if text.startswith(marker):
            self._held, self._is_trimming, self._step = text[len(marker) :], True, self._reasoning
            return True
        if self._is_end or not marker.startswith(text):
            self._step = self._content
            return True
        return False

    def _reasoning(self) -> bool:
        text, is_closed = self._until(self._format.think_close)
        if text := self._trimmed(text):
            self._parts.append(Part(reasoning=text))
        if is_closed:
            self._spaces, self._is_trimming, self._step = "", True, self._content
        return is_closed

    def _content(self) -> bool:
        text, is_call = self._held, False
        if not self._functions:
            self._held = ""
        elif self._format.call_open:
            text, is_call = self._until(self._format.call_open)
        elif not self._has_content:  # calls have no marker, so the content is either calls or text, never both
            text, is_call = "", self._held.lstrip()[:1] in ("{", "[")
            if not is_call and (self._held.strip() or self._is_end):
                text, self._held = self._held, ""
        else:
            self._held = ""
        self._add_content(text)
        if is_call:
            self._step = self._call
        elif self._is_end and not self._has_called:
            self._parts.append(Part(self._spaces))
        return is_call

    def _call(self) -> bool:
        opening, closing = str(self._format.call_open), self._format.call_close
        body, marker, rest = self._held.partition(closing or opening) if closing or opening else (self._held, "", "")
        if not marker and not self._is_end:
            return False
        self._held = rest
        if calls := calls_in(body, self._functions):
            self._parts.append(Part(calls=calls))
            self._has_called = True
        else:
            self._add_content(opening + body + (marker if closing else ""))
        self._step = self._call if marker and not closing else self._content
        return True

    def _until(self, marker: str) -> tuple[str, bool]:
        """Remove a marker and the text before the marker from the buffer. Return this text and whether the marker was found.

        If the marker is not found, text that can be the beginning of the marker stays in the buffer until the answer ends.
        """
        text, found, rest = self._held.partition(marker)
        if not found and not self._is_end:
            first = max(0, len(text) - len(marker) + 1)
            ready = next((at for at in range(first, len(text)) if marker.startswith(text[at:])), len(text))
            text, rest = text[:ready], text[ready:]
        self._held = rest
        return text, bool(found)

    def _add_content(self, text: str) -> None:
        if text := self._trimmed(text):
            self._has_content = True
            self._parts.append(Part(text))

    def _trimmed(self, text: str) -> str:
        """Return a text without the whitespace at the end. This whitespace is added before the next text."""
        if self._is_trimming:
            text = text.lstrip()
        self._is_trimming = self._is_trimming and not text
        text = self._spaces + text
        self._spaces = text[len(text.rstrip()) :]
        return text.rstrip()
