"""Parse a JSON body once, and replace its top-level `model` without serializing the body again."""

import asyncio
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sage.common.nesting import MAX_LEVELS, is_too_deep
from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.schema import MAX_MODEL_CHARS

Piece = bytes | memoryview
#: Bodies above this size are parsed in a thread.
LARGE_BYTES = 1_000_000
#: Texts below this length are parsed in one call, and then searched for `model`. Longer texts are parsed member by member,
#: because searching a long text would be too slow.
_SHORT_CHARS = 4096
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BEGIN = re.compile(r"[ \t\n\r]*{[ \t\n\r]*")
_BLANK = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
#: The name of a member, without escapes, and the colon after the name.
_SIMPLE_NAME = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA_OR_END = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_MODEL = b'"model"'
_TEXT_VALUE = re.compile(rb'[ \t\n\r]*:[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")')


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
_scan: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined] # used by `raw_decode`


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A request's body, which is valid JSON."""

    content: bytes
    names: frozenset[str]  #: names of the top-level members that are not null
    texts: Mapping[str, str]  #: top-level members that are strings of at most `MAX_MODEL_CHARS` characters
    #: Start and end of the value of each top-level `model`, as byte offsets; this member can occur several times.
    model_spans: tuple[tuple[int, int], ...]

    def with_model(self, model: str) -> list[Piece]:
        """Return the pieces of the body, with a new value of each top-level `model`; everything else is unchanged."""
        return _pieces(memoryview(self.content), self.model_spans, quoted(model))


async def parsed(body: bytes) -> JsonBody:
    """Parse a body and return it as JsonBody.

    Raises Refusal if the body is not JSON, is nested too deeply, or has half of a surrogate pair (not valid in UTF-8).
    """
    return await asyncio.to_thread(_parse, body) if len(body) > LARGE_BYTES else _parse(body)


@functools.lru_cache(1024)
def quoted(text: str) -> bytes:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False).encode()


def answer_with_model(answer: bytes, model: bytes) -> bytes:
    """Return an engine's answer with a new value of `model`; everything else is unchanged.

    answer: a JSON object; text before the first brace is kept.  model: the new value, as a JSON string.
    The answer is returned unchanged if it has no `model` that is a string. The answer is also returned unchanged if it
    contains `"model"` more than once and is not valid JSON.
    """
    at = answer.find(_MODEL)
    if at < 0:
        return answer
    end = at + len(_MODEL)
    if answer.find(_MODEL, end) < 0 and answer[at - 1 : at] != b"\\":
        found = _TEXT_VALUE.match(answer, end)
        return answer[: found.start(1)] + model + answer[found.end(1) :] if found else answer
    begin = answer.find(b"{")
    try:
        text = answer[begin:].decode()
        spans = [(start, end) for name, value, start, end in _members(text) if name == "model" and isinstance(value, str)]
    except (ValueError, RecursionError):
        return answer
    return answer[:begin] + _spliced(answer[begin:], _byte_spans(text, spans), model)


def _parse(body: bytes) -> JsonBody:
    try:
        text = body.decode()
        content, spans = _decode(text)
        if "\\" in text and _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeEncodeError as error:
        message = "The body has half of a surrogate pair (for example, a broken emoji)."
        raise Refusal(
            400, "invalid_unicode", message, "Send both halves of the surrogate pair, or remove this half."
        ) from error
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if _has_many_brackets(text) and is_too_deep(content):
        raise _too_deep()
    members = content.items() if isinstance(content, dict) else ()
    texts = {name: value for name, value in members if isinstance(value, str) and len(value) <= MAX_MODEL_CHARS}
    names = frozenset([name for name, value in members if value is not None])
    return JsonBody(body, names, texts, _byte_spans(text, spans))


def _decode(text: str) -> tuple[Any, list[tuple[int, int]]]:
    """Return the parsed content, and the start and end of each top-level `model` value, as character offsets.

    Raises ValueError or RecursionError.
    """
    if not _BEGIN.match(text):
        return _DECODER.decode(text), []
    if len(text) < _SHORT_CHARS and "\\u006" not in text:  # no letter of `model` is escaped in this text
        content = _DECODER.decode(text)
        at = text.find('"model"')
        if at < 0 or "model" not in content:
            return content, []
        if text.find('"model"', at + 1) < 0:
            start = _match(_COLON, text, at + len(_MODEL)).end()
            return content, [(start, _scan(text, start)[1])]
    content, spans = {}, []
    for name, value, start, end in _members(text):
        content[name] = value
        if name == "model":
            spans.append((start, end))
    return content, spans


def _members(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """For each member of a JSON object, yield name, value, and start and end offsets of the value. Raises ValueError."""
    at, separator = _match(_BEGIN, text, 0, "Expecting an object").end(), ","
    if text.startswith("}", at):
        at, separator = _match(_BLANK, text, at + 1).end(), "}"
    while separator == ",":
        if simple := _SIMPLE_NAME.match(text, at):
            name, start = simple[1], simple.end()
        else:
            name, start = _name(text, at)
        try:
            value, end = _scan(text, start)
        except StopIteration as error:
            raise json.JSONDecodeError("Expecting value", text, error.value) from None
        yield name, value, start, end
        if not (found := _COMMA_OR_END.match(text, end)):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at, separator = found.end(), found[1]
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _name(text: str, at: int) -> tuple[str, int]:
    if not text.startswith('"', at):
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    name, end = _DECODER.raw_decode(text, at)
    return name, _match(_COLON, text, end, "Expecting ':' delimiter").end()


def _match(pattern: re.Pattern[str], text: str, at: int, missing: str = "") -> re.Match[str]:
    if found := pattern.match(text, at):
        return found
    raise json.JSONDecodeError(missing, text, at)


def _byte_spans(text: str, spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    if text.isascii():
        return tuple(spans)
    return tuple((len(text[:start].encode()), len(text[:end].encode())) for start, end in spans)


def _spliced(content: bytes, spans: Iterable[tuple[int, int]], replacement: bytes) -> bytes:
    return b"".join(_pieces(content, spans, replacement))


def _pieces(content: Piece, spans: Iterable[tuple[int, int]], replacement: bytes) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    for start, end in spans:
        pieces += [content[at:start], replacement]
        at = end
    return [*pieces, content[at:]]


def _too_deep() -> Refusal:
    return Refusal(400, "json_too_deep", f"The body is nested more than {MAX_LEVELS} levels deep.")


def _has_many_brackets(text: str) -> bool:
    if len(text) < _SHORT_CHARS:
        return text.count("[") + text.count("{") > MAX_LEVELS // 2
    for bracket in "[{":
        count, at = 0, text.find(bracket)  # `find` is fast for long texts with few brackets
        while at >= 0:
            count, at = count + 1, text.find(bracket, at + 1)
            if count > MAX_LEVELS // 2:
                return True
    return False
