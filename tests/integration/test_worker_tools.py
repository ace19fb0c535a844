"""Tool calls and structured output of a real model, with chat templates like those of known model families."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, set_family
from workers import Server, error_of, events_of

from sage.libs.models.chat import ChatFormat
from sage.libs.models.loading import load_tokenizer
from sage.llm.workers import generation
from sage.llm.workers.answer_format import AnswerFormat
from sage.llm.workers.generator import Generator

ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now", "parameters": ZONE}}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "now", "parameters": ZONE, "strict": True}}
VERDICT = {
    "type": "object", "additionalProperties": False, "required": ["ok", "size", "tags"],
    "properties": {
        "ok": {"type": "boolean"}, "size": {"enum": ["s", "m"]},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
}  # fmt: skip


def matching(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, **more}}}


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    made = Generator(str(tiny_model), "fp32")
    made.voice.tokenizer.chat_template = CHATML.replace("<call>", "<tool_call>").replace("</call>", "</tool_call>")
    made.voice.answer_format = AnswerFormat.of(ChatFormat(made.voice.tokenizer))
    return made


@pytest.fixture
def server(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(generation, "Generator", lambda *_: generator)
    return Server(generation.build("tiny", "fp32", 8))


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    assert message["content"] is None
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}], ids=str)
def test_a_required_call_is_made_with_and_without_streaming(server: Server, choice: Any, temperature: float) -> None:
    body = {"tools": [NOW, STOP], "tool_choice": choice, "max_tokens": 400, "temperature": temperature, "seed": 1}
    answer = server.chat(**body, parallel_tool_calls=False).json()
    ((name, arguments),) = calls_of(answer["choices"][0]["message"])
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    if isinstance(choice, dict) or name == "now":
        assert (name, list(arguments)) == ("now", ["zone"])
    chunks = events_of(server.chat(**body, parallel_tool_calls=False, stream=True))
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]) for call in deltas] == [
        (0, answer["choices"][0]["message"]["tool_calls"][0]["function"])
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_matches_its_schema(server: Server) -> None:
    for seed in range(5):
        answer = server.chat(**matching(VERDICT), max_tokens=200, temperature=1.5, seed=seed, n=2).json()
        for choice in answer["choices"]:
            verdict = json.loads(choice["message"]["content"])
            assert list(verdict) == ["ok", "size", "tags"]
            assert (type(verdict["ok"]), verdict["size"] in "sm", len(verdict["tags"]) <= 3) == (bool, True, True)
            assert choice["finish_reason"] == "stop"


def test_an_answer_is_json_or_a_call_if_both_are_asked_for(server: Server) -> None:
    kinds = set()
    for seed in range(12):
        body = {**matching({"enum": ["no call"]}), "tools": [STRICT], "parallel_tool_calls": False}
        message = server.chat(**body, max_tokens=200, temperature=2, seed=seed).json()["choices"][0]["message"]
        kinds.add("call" if message.get("tool_calls") else json.loads(message["content"]))
    assert kinds == {"call", "no call"}


def test_an_answer_in_the_format_json_object_begins_with_a_brace(server: Server) -> None:
    content = server.chat(response_format={"type": "json_object"}).json()["choices"][0]["message"]["content"]
    assert content.startswith("{")


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [({"not": {"type": "string"}}, "not"), ({"type": "string", "format": "nonsense"}, "nonsense"),
     ({"oneOf": [{"maxLength": 3}, {"minLength": 2}]}, "oneOf"), ({"type": "strin"}, "strin"),
     ({"$ref": "http://127.0.0.1:9/x"}, "127.0.0.1")],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_keyword(server: Server, schema: Any, keyword: str) -> None:
    error = error_of(server.chat(**matching(schema, strict=True)))
    assert (error["code"], error["param"]) == ("unsupported_value", "response_format")
    assert keyword in error["message"]
    tool = {
        "type": "function",
        "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": schema}}},
    }
    assert error_of(server.chat(tools=[tool]))["param"] == "tools"


def test_offered_tools_are_in_the_prompt_and_need_not_be_called(server: Server) -> None:
    free, offered = server.chat(max_tokens=20).json(), server.chat(max_tokens=20, tools=[NOW]).json()
    assert "tool_calls" not in offered["choices"][0]["message"]
    assert offered["usage"]["prompt_tokens"] > free["usage"]["prompt_tokens"]


FORMATS = {
    "chatml": ("<call>", "</call>", "object", ""), "mistral": ("[CALLS]", "", "list", ""),
    "think": ("<call>", "</call>", "object", "<think>"), "gemma": (None, "", "other", ""), "llama3": (None, "", "other", ""),
}  # fmt: skip


@pytest.mark.parametrize("family", FORMATS)
def test_the_notation_of_calls_and_reasoning_is_read_from_the_template(family: str, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    set_family(tokenizer, family)
    found = AnswerFormat.of(ChatFormat(tokenizer))
    assert (found.call_open, found.call_close, found.calls, found.think_open) == FORMATS[family]
    assert len(found.special_tokens(tokenizer)) == (1 if family == "mistral" else 0)


def test_markers_that_a_tokenizer_declares_are_used_if_its_template_shows_none(tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    calls, thoughts = {"open": "<|call>", "close": "<call|>"}, {"open": "<|channel>thought\n", "close": "<channel|>"}
    tokenizer.response_template = {"fields": {"tool_calls": calls, "reasoning_content": thoughts}}
    found = AnswerFormat.of(ChatFormat(tokenizer))
    assert (found.call_open, found.call_close, found.think_open) == ("<|call>", "<call|>", "<|channel>thought")
