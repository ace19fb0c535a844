"""Chat turns in all accepted forms: which answers are trained on, and errors that name the position."""

import json
from typing import Any

import pytest

from sage.libs.finetune.data.formats import parse_record
from sage.libs.finetune.data.samples import Chat
from sage.libs.finetune.data.values import RecordError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"part": "seal"}}}
FLAGS = ["loss", "train", "trainable", "training", "train_on_turn"]


def chat_of(record: Any) -> Chat:
    content = parse_record(record).content
    assert isinstance(content, Chat)
    return content


def refusal_of(record: Any) -> str:
    with pytest.raises(RecordError) as caught:
        parse_record(record)
    return f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("flag", [*({name: False} for name in FLAGS), {"weight": 0}, {"weight": 0.0}])
def test_an_answer_excluded_by_any_flag_is_context_only(flag: dict[str, Any]) -> None:
    turns = [USER, {**ANSWER, **flag}, USER, ANSWER]
    assert chat_of({"messages": turns}).untrained == {1}
    shared = [{"from": turn["role"], "value": turn["content"], **flag} for turn in turns[:2]]
    chat = chat_of(
        {"conversations": [*shared, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    )
    assert chat.untrained == {2}
    assert not chat.ignored


@pytest.mark.parametrize("flag", [*({name: True} for name in FLAGS), {"weight": 1}, {"weight": 1.0}, {"weight": None}, {}])
def test_an_answer_that_no_flag_excludes_is_trained_on(flag: dict[str, Any]) -> None:
    assert not chat_of({"messages": [USER, {**ANSWER, **flag}]}).untrained


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ({"weight": 0.5}, "messages[1].weight is 0.5. The weight must be 1, or 0 to exclude the turn from training."),
        ({"weight": "0"}, 'messages[1].weight is "0".'),
        ({"weight": True}, "messages[1].weight is true."),
        ({"weight": 2}, "messages[1].weight is 2."),
        ({"train": "no"}, 'messages[1].train is "no". The value must be true, or false'),
        ({"loss": 0}, "messages[1].loss is 0."),
        ({"weight": 1, "train": False}, "weight and train contradict each other"),
    ],
)
def test_a_flag_of_another_type_is_rejected_with_its_position(flag: dict[str, Any], said: str) -> None:
    assert said in refusal_of({"messages": [USER, {**ANSWER, **flag}]})


def test_a_flag_to_train_on_a_question_has_no_effect_and_is_reported() -> None:
    assert chat_of({"messages": [{**USER, "train": True}, ANSWER]}).ignored == ("messages[].train",)
    assert not chat_of({"messages": [{**USER, "train": False}, ANSWER]}).ignored


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_reasoning_reaches_the_template_under_one_name(name: str, shape: str) -> None:
    turns = [USER, {**ANSWER, name: "because"}]
    if shape == "conversations":
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", name: "because"}]
    assert chat_of({shape: turns}).messages[1] == {**ANSWER, "reasoning_content": "because"}


def test_an_answer_that_only_reasons_is_not_empty() -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": "because"}
    assert chat_of({"messages": [USER, message]}).messages[1] == {**message, "content": ""}


def test_two_different_reasoning_fields_are_rejected() -> None:
    message = {**ANSWER, "thinking": "x", "reasoning": "y"}
    assert "reasoning and thinking differ" in refusal_of({"messages": [USER, message]})
    assert chat_of({"messages": [USER, {**message, "reasoning": "x"}]}).messages[1]["reasoning_content"] == "x"


def test_ids_and_names_of_calls_reach_the_template() -> None:
    call = {"id": "Ab00xyz00", **CALL}
    result = {"role": "tool", "name": "stock", "tool_call_id": "Ab00xyz00", "content": '{"count": 3}'}
    chat = chat_of({"messages": [USER, {"role": "assistant", "tool_calls": [{**call, "index": 0}]}, result, ANSWER]})
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chat.messages[2] == result
    assert not chat.ignored


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_the_older_function_call_becomes_a_tool_call(content: dict[str, Any]) -> None:
    call = {"role": "assistant", **content, "function_call": {"name": "stock", "arguments": '{"part": "seal"}'}}
    record = {
        "messages": [USER, call, {"role": "function", "name": "stock", "content": "0"}, ANSWER],
        "functions": [{"name": "stock"}],
    }
    chat = chat_of(record)
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.messages[2] == {"role": "tool", "content": "0", "name": "stock"}
    assert chat.tools == [{"type": "function", "function": {"name": "stock"}}]


def test_tools_without_a_function_object_are_wrapped() -> None:
    flat = {"name": "stock", "description": "Pieces.", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": flat}]
    for tools in ([flat], json.dumps([flat]), [{"type": "function", **flat}], wrapped):
        assert chat_of({"messages": [USER, ANSWER], "tools": tools}).tools == wrapped


SEAL, PUMP = CALL["function"], {"name": "stock", "arguments": {"part": "pump"}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "function_call", "value": json.dumps([SEAL, PUMP])}],
        [{"from": "function_call", "value": [SEAL, PUMP]}],
        [{"from": "function_call", "value": json.dumps(call)} for call in (SEAL, PUMP)],
        [{"role": "tool_call", "content": json.dumps(call)} for call in (SEAL, PUMP)],
    ],
)
def test_several_calls_are_one_answer(turns: list[Any]) -> None:
    results = [{"role": "tool_response", "content": "4"}, {"from": "observation", "value": "2"}]
    chat = chat_of({"conversations": [USER, *turns, *results, ANSWER]})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"] for call in chat.messages[1]["tool_calls"]] == [SEAL, PUMP]


def test_a_text_and_the_call_after_it_are_one_answer() -> None:
    call = {"from": "function_call", "value": json.dumps(SEAL)}
    chat = chat_of(
        {"conversations": [USER, {"from": "gpt", "value": "I look.", "loss": False}, {**call, "loss": False}, USER, ANSWER]}
    )
    assert chat.messages[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    assert chat.untrained == {1}
    half = {"conversations": [USER, {"from": "gpt", "value": "I look."}, {**call, "loss": False}, USER, ANSWER]}
    assert "conversations[2] continues the previous answer" in refusal_of(half)


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}"])
def test_a_call_without_arguments_has_empty_arguments(arguments: Any) -> None:
    call = {"function": {"name": "clock", "arguments": arguments}}
    messages = chat_of({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "clock", "arguments": {}}}]


def test_null_counts_as_missing_except_in_arguments() -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": {"x": None}}}
    messages = [
        {"role": "user", "content": "q", "tool_calls": None, "weight": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": None},
        {"role": "tool", "content": "1", "tool_call_id": None},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string", "enum": None}}}}]
    chat = chat_of({"messages": messages, "tools": tools})
    assert chat.messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}],
        },
        {"role": "tool", "content": "1"},
    ]
    assert chat.tools == [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string"}}}}]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"from": "function_call", "value": "{'name': 'f'}"}, "conversations[1].value is not valid JSON"),
        ({"from": "function_call", "value": "[]"}, "conversations[1].value has no calls"),
        ({"from": "function_call", "value": [SEAL, 3]}, "conversations[1].value[1] must be an object with name"),
        ({"from": "function_call", "value": {"arguments": {}}}, "conversations[1].value must be an object with name"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "x"}},
         "conversations[1].function_call.arguments is not valid JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
         "conversations[1].tool_calls[0].function.arguments must be an object, found a list"),
        ({"role": "assistant", "tool_calls": [{"id": 1, **CALL}]}, "tool_calls[0].id must be text"),
        ({"role": "assistant", "tool_calls": 3}, "tool_calls' must be a list"),
        ({"from": "observation", "value": {"count": 4}}, "conversations[1].value must be text, found an object"),
        ({"role": "user", "content": None}, "conversations[1].content must be text, found nothing"),
        ({"role": "user", "content": ["x"]}, "conversations[1].content must be text, found a list"),
        ({"role": "user", "content": [{"type": "image_url"}]}, 'content[0] has type "image_url": only text'),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "content[0].text must be text, found a number"),
        ({"role": "user", "content": "\ud83d half"}, "conversations[1].content has an incomplete character (lone surrogate"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "\ud83d"}}}]},
         "tool_calls[0] has an incomplete character"),
        ({"role": "a long text " * 9, "content": "x"}, "conversations[1].role is text."),
        ({"role": "\ud83d", "content": "x"}, 'conversations[1].role is "\\ud83d"'),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_turn_names_a_field_that_is_in_the_file(turn: Any, said: str) -> None:
    message = refusal_of({"conversations": [USER, turn, ANSWER]})
    assert said in message
    message.encode()


@pytest.mark.parametrize(
    "turns", [[ANSWER, USER, ANSWER], [{"role": "system", "content": "s"}, ANSWER], [USER, USER, ANSWER, ANSWER]]
)
def test_the_order_of_roles_is_left_to_the_template(turns: list[Any]) -> None:
    assert chat_of({"messages": turns}).messages == turns


def test_fields_without_an_effect_are_reported() -> None:
    messages = [{**USER, "timestamp": 3, "id": "m1"}, {**ANSWER, "refusal": None, "train_detail": [{"begin": 0}]}]
    record = {"messages": messages, "source": "web", "id": 7, "tools": [], "images": [], "label\ud83d": 1}
    parsed = parse_record(record)
    assert parsed.ignored == ("source", "label?", "messages[].timestamp", "messages[].train_detail")
    assert parsed.content.ignored == parsed.ignored
    assert parse_record({"text": "t", "source": "web", "id": 3}).ignored == ("source",)
