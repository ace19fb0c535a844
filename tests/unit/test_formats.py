import json
from typing import Any

import pytest
from support import chat_record

from sage.libs.finetune.data.formats import parse_record
from sage.libs.finetune.data.samples import Chat
from sage.libs.finetune.data.values import RecordError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "name", "messages"),
    [
        ({"messages": [USER, ANSWER]}, "openai", [USER, ANSWER]),
        ({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}, "openai",
         [{"role": "system", "content": "s"}, USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}, "openai", [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, "sharegpt",
         [{"role": "system", "content": "s"}, USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, "sharegpt", [USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [{"role": "user", "content": "q\ni"}, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, "alpaca",
         [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, USER, ANSWER]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, "openai", [USER, ANSWER]),
    ],
)  # fmt: skip
def test_every_format_becomes_the_same_chat(record: Any, name: str, messages: list[Any]) -> None:
    found, content, ignored = parse_record(record)
    assert found == name
    assert not ignored
    assert isinstance(content, Chat)
    assert content.messages == messages


def test_plain_text_stays_text() -> None:
    assert parse_record({"text": "once upon a time"})[:2] == ("text", "once upon a time")


def test_tool_calls_keep_their_arguments_as_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "1", "content": "2"}, ANSWER],
        "tools": tools,
    }  # fmt: skip
    content = parse_record(record).content
    assert isinstance(content, Chat)
    assert content.tools == tools
    assert content.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_an_assistant_turn_of_weight_zero_is_context_only() -> None:
    record = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    content = parse_record(record).content
    assert isinstance(content, Chat)
    assert content.untrained == {1}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "a JSON object is expected, found a list"),
        ({"foo": 1}, "no known format has the fields foo"),
        ({"messages": "hello"}, "'messages' must be a list, found text"),
        ({"messages": ["hello"]}, "messages[0] must be an object with role and content, found text"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 'messages[0].role is "wizard"'),
        ({"messages": [{"content": "x"}]}, "messages[0].role is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text, found a number"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        (chat_record("q", " "), "every assistant turn is empty"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "a system message may only come first"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, 'conversations[0].from is "cat"'),
        ({"instruction": "q", "output": None}, "no known format"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0] must be a pair"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": 1}]}]}, "tool_calls[0].function must be"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' must be a list of objects"),
        ({"text": ""}, "'text' is empty"),
    ],
)
def test_a_wrong_record_says_where_it_is_wrong(record: Any, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(record)
    assert said in caught.value.message
