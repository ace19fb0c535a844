"""How the gateway reads a JSON body and replaces only the value of `model`."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.gateway.errors import Refusal
from sage.llm.gateway.json_text import JsonBody, answer_with_model, parsed, quoted

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
NAMES = st.sampled_from(["model", "mod\u0065l", "Model", 'mo"del', "model\\", "x"]) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8)


def body_of(content: str | bytes) -> JsonBody:
    return asyncio.run(parsed(content.encode() if isinstance(content, str) else content))


@given(content=st.dictionaries(NAMES, VALUES), indent=st.none() | st.integers(0, 3), is_ascii=st.booleans())
def test_only_the_top_level_model_changes(content: dict[str, Any], indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=is_ascii).encode()
    body = body_of(b" \n" + text + b"\t")
    renamed = b"".join(body.with_model('a "näme"'))
    assert json.loads(renamed) == content | ({"model": 'a "näme"'} if "model" in content else {})
    assert len(renamed) == len(text) + 3 or "model" in content
    assert body.texts == {name: value for name, value in content.items() if isinstance(value, str)}


@pytest.mark.parametrize(
    "text",
    [
        '{"model": OLD, "model":OLD}',
        '{"mod\\u0065l": OLD}',
        '{"x":{"model":"a"},"model" : OLD }',
        '{"é":"\\"model\\":\\"a\\"","model":OLD,"z":"é"}',
        '{"a":"model","model":OLD}',
        '{"seed": 123456789012345678901234567890.10, "model": OLD}',
        "{}",
        "[1]",
    ],
)
@pytest.mark.parametrize("old", ['"a"', '"x\\"y\\\\"', '"ü"', "1", "{}"])
def test_duplicates_escapes_and_numbers_are_kept_as_they_are(text: str, old: str) -> None:
    assert b"".join(body_of(text.replace("OLD", old)).with_model("b")).decode() == text.replace("OLD", '"b"')


def test_the_last_of_two_model_fields_is_used() -> None:
    assert body_of('{"model": "a", "model": "b"}').texts == {"model": "b"}
    assert body_of('{"model": "a", "model": 1}').texts == {}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,', '{"a":1,}', "{,}", "{a:1}", '{"a":1 "b":2}', '{"a" 1}', "{} x"),
        *('{"a":1}}', '{"a":NaN}', '{"a":-Infinity}', '{"a":01}', '{"a":"\n"}', "{1:2}", "\ufeff{}", '{"a":1}\x00', "[1,]"),
    ],
)
def test_invalid_json_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        body_of(text)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(
    "answer",
    [
        b'{"id":"1","model":OLD,"choices":[]}',
        b'data: {"model" : OLD, "choices":[]}\r',
        b'{"choices":[{"text":"\\"model\\":\\"a\\""}],"model":OLD}',
        b'data: {"choices":[{"arguments":{"model":"a"}}],"model":OLD}\r',
        b'{"top_logprobs":[{"model":-0.5}]}',
        b'{"token":"model"}',
        b'{"a":"ends with \\"model"}',
        b"data: [DONE]",
        b'data: "model" and "model"',
        b'{"model":"\xff","x":"model"}',
    ],
)
@pytest.mark.parametrize("old", [b'"a"', b'"x\\"y\\\\"', '"ü"'.encode()])
def test_an_answer_names_the_engine_and_is_otherwise_unchanged(answer: bytes, old: bytes) -> None:
    assert answer_with_model(answer.replace(b"OLD", old), quoted("b")) == answer.replace(b"OLD", b'"b"')
