"""Tool calls and reasoning are found in whole and in streamed answers. Text that only looks like a tool call stays text."""

import json
from typing import Any

import pytest

from sage.llm.workers.answer_format import AnswerFormat
from sage.llm.workers.sampling import Piece
from sage.llm.workers.shapes import ChatShape
from sage.llm.workers.tool_calls import AnswerReader, Part

FUNCTIONS: dict[str, Any] = {
    "now": {},
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "unit": {"type": "string"}},
    },
}
HERMES = AnswerFormat(call_open="<tool_call>", call_close="</tool_call>", think_open="<think>", think_close="</think>")
LLAMA = AnswerFormat(call_open="")
MISTRAL = AnswerFormat(call_open="[TOOL_CALLS]")
PHI = AnswerFormat(call_open="<|tool_call|>", call_close="<|/tool_call|>")
ADD, NOW = ("add", {"a": 1, "b": 2}), ("now", {})


def read(answer_format: AnswerFormat, pieces: list[str], **options: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    reader = AnswerReader(answer_format, options.pop("functions", FUNCTIONS), **options)
    parts: list[Part] = [*map(reader.push, pieces), reader.flush()]
    assert all(call.arguments.encode() for part in parts for call in part.calls)
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(part.content for part in parts), "".join(part.reasoning for part in parts), calls


SUM = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
LLAMA_SUM = SUM.replace("arguments", "parameters")
XML = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=unit>\n5\n</parameter>\n</function>"
CALLS_AND_THOUGHTS: list[tuple[AnswerFormat, str, tuple[str, str, list[Any]]]] = [
    (HERMES, f"<tool_call>\n{SUM}\n</tool_call>", ("", "", [ADD])),
    (HERMES, f"I add.\n<tool_call>{SUM}</tool_call>\n", ("I add.", "", [ADD])),
    (HERMES, f'<tool_call>{{"name": "now"}}</tool_call>\n<tool_call>{SUM}</tool_call>', ("", "", [NOW, ADD])),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', ("", "", [ADD])),
    (HERMES, f"<tool_call>{SUM}", ("", "", [ADD])),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"unit": "\\ud83d"}}</tool_call>',
        ("", "", [("add", {"unit": "\ud83d"})]),
    ),
    (HERMES, f"<tool_call>\n{XML}\n</tool_call>", ("", "", [("add", {"a": 1, "unit": "5"})])),
    (HERMES, "<think>\nShall I?\n</think>\n\nYes.", ("Yes.", "Shall I?", [])),
    (HERMES, '\n<think>a < b</think><tool_call>{"name": "now", "arguments": {}}</tool_call>', ("", "a < b", [NOW])),
    (HERMES, "<think>cut", ("", "cut", [])),
    (LLAMA, LLAMA_SUM, ("", "", [ADD])),
    (LLAMA, LLAMA_SUM + '; {"name": "now", "parameters": {}}', ("", "", [ADD, NOW])),
    (MISTRAL, f'[TOOL_CALLS] [{SUM}, {{"name": "now", "arguments": {{}}}}]', ("", "", [ADD, NOW])),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]now[CALL_ID]x1[ARGS]{}', ("", "", [ADD, NOW])),
    (PHI, f'<|tool_call|>[{{"type": "function", "function": {SUM}}}]<|/tool_call|>', ("", "", [ADD])),
]
TEXTS: list[tuple[AnswerFormat, str]] = [
    (HERMES, "  plain text\n "),
    (HERMES, "<thin"),
    (HERMES, "x <think>y</think>"),
    (HERMES, "<tool_call> is a tag; </tool_call> too"),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call> no'),
    (HERMES, "<tool_call>" + "[" * 3000),
    (HERMES, "a <tool_"),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    (LLAMA, '{"answer": 5}'),
    (LLAMA, f"See {LLAMA_SUM}"),
    (MISTRAL, "[TOOL_CALLS][TOOL_CALLS]add[ARGS]"),
    (AnswerFormat(), f"<tool_call>{SUM}</tool_call>"),
]
CASES = [*CALLS_AND_THOUGHTS, *((answer_format, text, (text, "", [])) for answer_format, text in TEXTS)]


@pytest.mark.parametrize(("answer_format", "text", "expected"), CASES, ids=[case[1][:50] for case in CASES])
def test_whole_and_streamed_answers_are_split_in_the_same_way(answer_format: AnswerFormat, text: str, expected: Any) -> None:
    for length in (len(text), 1, 2, 3, 7):
        pieces = [text[at : at + length] for at in range(0, len(text), length)]
        assert read(answer_format, pieces) == expected, length


def test_without_tools_a_tool_call_is_text_and_is_not_held_back() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    reader = AnswerReader(HERMES, {})
    assert reader.push(text) == Part(text)


def test_a_prompt_may_begin_the_reasoning() -> None:
    assert read(HERMES, ["\nthe", "n\n", "</think>\n", "\nfive"], is_reasoning=True) == ("five", "then", [])


def test_content_is_not_held_back_longer_than_a_marker() -> None:
    reader = AnswerReader(HERMES, FUNCTIONS)
    assert [reader.push(piece).content for piece in ("Hi", " there <", "b>", " ")] == ["Hi", " there", " <b>", ""]


def chat(pieces: list[Piece]) -> ChatShape:
    shape = ChatShape("m", with_logprobs=False)
    shape.read_with(lambda: AnswerReader(HERMES, FUNCTIONS))
    return shape


CALLS = '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now"}</tool_call>'


def test_tool_calls_have_openai_s_format_distinct_ids_and_their_own_finish_reason() -> None:
    pieces = [Piece("Wait. "), Piece(CALLS), Piece("", finish_reason="stop", completion_tokens=9)]
    choice = chat(pieces).whole(pieces)["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"], message["role"]) == ("tool_calls", "Wait.", "assistant")
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "now", "arguments": "{}"}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert chat([]).whole(pieces[1:])["choices"][0]["message"]["content"] is None
    cut = [Piece(CALLS), Piece("", finish_reason="length")]
    assert chat(cut).whole(cut)["choices"][0]["finish_reason"] == "length"


def test_streamed_calls_are_numbered_within_their_choice() -> None:
    shape = chat([])
    pieces = [Piece(CALLS, index=1), Piece("<think>hm</think>", index=0), Piece("x", index=0), Piece(CALLS, index=1)]
    chunks = [chunk["choices"][0] for piece in pieces for chunk in shape.chunks(piece, is_first=False)]
    assert [call["index"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())] == [0, 1, 2, 3]
    assert [chunk["delta"] for chunk in chunks if chunk["index"] == 0] == [{"reasoning_content": "hm"}, {"content": "x"}]
    ends = [shape.chunks(Piece("", index=index, finish_reason="stop"), is_first=False)[0]["choices"][0] for index in (0, 1)]
    assert [end["finish_reason"] for end in ends] == ["stop", "tool_calls"]
