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


@pytest.mark.parametrize(
    "answer", ['{"part": "seal"}', '["seal"]', "[]", "{}", " [1]\n", '[{"role": "assistant", "content": "x"}]']
)
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": ...},
        {"prompt": [USER], "completion": ...},
        {"instruction": "q", "output": ...},
        {"messages": [USER, {"role": "assistant", "content": ...}]},
        {"conversations": [USER, {"from": "gpt", "value": ...}]},
    ],
)
def test_an_answer_that_is_json_is_trained_on_unchanged(record: dict[str, Any], answer: str) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return [filled(item) for item in value] if isinstance(value, list) else answer if value is ... else value

    assert parse_record(filled(record)).content.messages == [USER, {"role": "assistant", "content": answer}]


def test_a_question_that_is_json_stays_a_text_unless_it_contains_messages() -> None:
    for question in ('["seal"]', '{"part": "seal"}', "[]", "[1", '[{"part": "seal"}]'):
        messages = parse_record({"prompt": question, "completion": "a"}).content.messages
        assert messages == [{"role": "user", "content": question}, ANSWER]
    packed = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert parse_record(packed).content.messages == [USER, ANSWER]
    assert parse_record({**packed, "completion": "a"}).content.messages == [USER, ANSWER]


def test_a_completion_may_repeat_its_prompt_and_answers_in_the_prompt_are_context() -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "r"}]
    for completion in ([*turns, ANSWER], [ANSWER]):
        content = parse_record({"prompt": turns, "completion": completion}).content
        assert content.messages == [*turns, ANSWER]
        assert content.untrained == {1}
    weighed = {"prompt": turns, "completion": [*turns, {**ANSWER, "weight": 0}, USER, ANSWER]}
    assert parse_record(weighed).content.untrained == {1, 3}


def test_a_system_message_in_its_own_field_comes_first() -> None:
    system = {"role": "system", "content": "s"}
    for said in (
        {"messages": [USER, ANSWER]},
        {"messages": [system, USER, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [system, USER], "completion": [USER, ANSWER]},
    ):
        assert parse_record({**said, "system": "s"}).content.messages == [system, USER, ANSWER]


def test_each_turn_and_tool_may_be_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {"messages": [json.dumps(USER), json.dumps(ANSWER)], "tools": [json.dumps(tools[0])]}
    assert parse_record(record).content == Chat([USER, ANSWER], tools)


def test_turns_may_be_given_as_one_list_per_field() -> None:
    record = {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}
    assert parse_record(record).content.messages == [USER, ANSWER]
    uneven = {"conversations": {"from": ["human"], "value": ["q", "a"]}}
    with pytest.raises(RecordError, match="'conversations' must be a list, found an object"):
        parse_record(uneven)


def test_an_empty_list_of_images_in_json_text_is_ignored() -> None:
    assert parse_record({"prompt": "q", "completion": "a", "images": "[]"}).content.messages == [USER, ANSWER]


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
        ({"messages": "[{'role': 'user', 'content': 'q'}]"}, "'messages' is not valid JSON: Expecting property name"),
        ({"messages": ["hello"]}, "messages[0] must be an object with role and content, found text"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 'messages[0].role is "wizard"'),
        ({"messages": [{"content": "x"}]}, "messages[0].role is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text, found a number"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        (chat_record("q", " "), "every assistant turn is empty"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "a system message must be the first message"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, 'conversations[0].from is "cat"'),
        ({"instruction": "q", "output": None}, "no known format"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0] must be a pair"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": 1}]}]}, "tool_calls[0].function must be"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' must be a list of objects"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "\ud83d"}, "text has an incomplete character (lone surrogate \\ud83d)"),
        ({"\ud83d": 1}, "no known format has the fields ?"),
        ({"instruction": "q", "output": {"part": "seal"}}, "output must be text, found an object"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "are only for the methods dpo and orpo"),
        ({"messages": [USER, ANSWER], "images": ["a.jpg"]}, "'images' is not supported: only text can be trained on"),
        ({"text": "x", "audio": {"path": "a.wav"}}, "'audio' is not supported: only text can be trained on"),
        ({"messages": [{"role": "system", "content": "t"}, USER, ANSWER], "system": "s"}, "two different system messages"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools[0] must have a function with a name"),
    ],
)
def test_the_error_for_an_invalid_record_names_the_field(record: Any, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(record)
    assert said in caught.value.message
