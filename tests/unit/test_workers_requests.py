"""Each field of OpenAI's requests has an effect, or cannot change the answer, or is rejected with its name."""

from typing import Any

import pytest
from pydantic import ValidationError

from sage.common.errors import ConfigError
from sage.llm.workers.output import Output
from sage.llm.workers.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from sage.llm.workers.sampling import Sampling
from sage.llm.workers.server import invalid_request

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
EMBEDDING: dict[str, Any] = {"model": "m", "input": "hi"}
NOW = {"name": "now", "parameters": {"type": "object", "default": None}}
TOOL: dict[str, Any] = {"type": "function", "function": NOW}
MATCHING = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [None, 1]}, "strict": True}}
THEN: dict[str, Any] = {"type": "function", "function": {"name": "then", "strict": True}}


def sampling(kind: type[ChatRequest] | type[CompletionRequest], body: dict[str, Any]) -> Sampling:
    return kind.model_validate(body).sampling(default_max_tokens=64)


def refusal(kind: Any, body: dict[str, Any]) -> ConfigError:
    try:
        request = kind.model_validate(body)
        if kind is not EmbeddingRequest:
            request.sampling(64)
        if kind is ChatRequest:
            request.output()
    except ValidationError as error:
        return invalid_request([{**found, "loc": ("body", *found["loc"])} for found in error.errors()])
    except ConfigError as error:
        return error
    raise AssertionError(f"{body} was accepted")


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1}, {"frequency_penalty": 0}, {"presence_penalty": 0}, {"logit_bias": {}}, {"tools": []},
        {"tool_choice": "auto"}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
        {"user": "u"}, {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "auto"}, {"safety_identifier": "s"},
        {"parallel_tool_calls": False}, {"prompt_cache_key": "k"}, {"stop": []}, {"logprobs": False}, {"stream": False},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_cannot_change_an_answer_are_accepted_without_effect(more: dict[str, Any]) -> None:
    assert sampling(ChatRequest, CHAT | more) == sampling(ChatRequest, CHAT)


def test_the_number_of_answers_of_a_request_is_limited() -> None:
    sampling(CompletionRequest, COMPLETION | {"prompt": ["hi"] * 16, "n": 128})
    error = refusal(CompletionRequest, COMPLETION | {"prompt": ["hi"] * 17, "n": 128})
    assert (error.param, error.http_status) == ("n", 400)
    assert "2176 answers are requested" in error.message


@pytest.mark.parametrize(
    ("kind", "body"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION), (EmbeddingRequest, EMBEDDING)]
)
def test_null_counts_as_missing(kind: Any, body: dict[str, Any]) -> None:
    nulls = dict.fromkeys(kind.model_fields.keys() - body.keys()) | {"not_yet_invented": None}
    assert kind.model_validate(body | nulls) == kind.model_validate(body)


def test_null_inside_messages_counts_as_missing_but_stays_in_the_schema_of_a_tool() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None, "annotations": []}
    request = ChatRequest.model_validate({"model": "m", "messages": [message], "tools": [TOOL]})
    assert request.conversation() == [{"role": "assistant", "tool_calls": [call]}]
    assert request.offered_tools() == [TOOL]
    without_tools = ChatRequest.model_validate({"model": "m", "messages": [message], "tools": [TOOL], "tool_choice": "none"})
    assert without_tools.offered_tools() == []


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_its_usual_names(name: str) -> None:
    message = {"role": "assistant", "content": "4", name: "2 + 2"}
    assert ChatRequest.model_validate({"model": "m", "messages": [message]}).conversation() == [message]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"max_tokens": 10**30}, {"max_tokens": 10**30}),
        ({"temperature": 1e-40}, {"temperature": 1e-40}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b", "c", "d"]}, {"stop": ("a", "b", "c", "d")}),
        ({"logit_bias": {"7": -100}}, {"logit_bias": {7: -100.0}}),
        ({"frequency_penalty": 2, "presence_penalty": -2}, {"frequency_penalty": 2.0, "presence_penalty": -2.0}),
        ({"top_k": -1, "min_p": 0.5, "repetition_penalty": 1.1}, {"top_k": -1, "min_p": 0.5, "repetition_penalty": 1.1}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
    ],
    ids=str,
)
def test_fields_that_change_an_answer_reach_the_sampling(more: dict[str, Any], expected: dict[str, Any]) -> None:
    made = sampling(ChatRequest, CHAT | more)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 2**63}, {"seed": -(2**63) - 1}, {"seed": 2**64}, {"seed": 1.5}, {"seed": "1"},
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": float("nan")}, {"temperature": "1"},
        {"top_p": 0}, {"top_p": 1.1}, {"top_p": float("inf")}, {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0},
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "5"}, {"max_tokens": True},
        {"max_completion_tokens": 0}, {"n": 0}, {"n": 129}, {"n": True}, {"stream": "yes"}, {"stop": ""}, {"stop": [""]},
        {"stop": 5}, {"stop": ["a"] * 5}, {"stop": "a" * 2000}, {"logit_bias": {"a": 1}}, {"logit_bias": {"1": 101}},
        {"frequency_penalty": 2.1}, {"presence_penalty": -2.1}, {"top_logprobs": 21, "logprobs": True}, {"top_logprobs": 3},
        {"logprobs": 3}, {"stream_options": {"include_usage": True}}, {"model": "m" * 513}, {"model": ""}, {"model": 5},
        {"messages": []}, {"messages": "hi"}, {"messages": ["hi"]}, {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": 42}]}, {"messages": [{"role": "nobody", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "hi", "weight": 0}]},
        {"tools": [{"type": "web_search"}]}, {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tool_choice": "required"}, {"tool_choice": "required", "tools": []}, {"tool_choice": "any", "tools": [TOOL]},
        {"tool_choice": {"type": "function", "function": {"name": "then"}}, "tools": [TOOL]},
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": [TOOL]},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}}, {"response_format": "json"},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        {"modalities": ["audio"]}, {"store": True},
    ],
    ids=lambda more: str(more)[:60],
)  # fmt: skip
def test_invalid_values_are_rejected_with_the_field_s_name(more: dict[str, Any]) -> None:
    error = refusal(ChatRequest, CHAT | more)
    assert error.http_status == 400
    assert error.param in more
    assert str(error.param) in error.message
    assert error.code in ("invalid_value", "unsupported_value", "missing_value")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, Output()),
        ({"response_format": {"type": "json_object"}}, Output(schema={"type": "object"})),
        ({"response_format": MATCHING}, Output(schema={"enum": [None, 1]})),
        ({"tools": [TOOL]}, Output(functions=[NOW])),
        ({"tools": [TOOL], "tool_choice": "none"}, Output()),
        ({"tools": [TOOL, THEN], "tool_choice": "required"}, Output(functions=[NOW, THEN["function"]], must_call=True)),
        ({"tools": [TOOL, THEN], "tool_choice": {"type": "function", "function": {"name": "now"}}},
         Output(functions=[NOW], must_call=True, may_call_several=False)),
        ({"tools": [TOOL], "parallel_tool_calls": False}, Output(functions=[NOW], may_call_several=False)),
    ],
    ids=str,
)  # fmt: skip
def test_the_requested_form_of_an_answer_is_read(more: dict[str, Any], expected: Output) -> None:
    assert ChatRequest.model_validate(CHAT | more).output() == expected


@pytest.mark.parametrize(
    "name",
    ["functions", "function_call", "guided_json", "prediction", "reasoning_effort", "audio", "ignore_eos", "echo", "suffix"],
)
def test_unknown_fields_are_rejected_with_their_names(name: str) -> None:
    error = refusal(ChatRequest, CHAT | {name: {}})
    assert (error.code, error.param) == ("unsupported_value", name)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)  # fmt: skip
def test_one_or_several_prompts_can_be_given_as_text_or_as_token_ids(prompt: Any, read: list[Any]) -> None:
    assert CompletionRequest.model_validate(COMPLETION | {"prompt": prompt}).prompt == read
    assert EmbeddingRequest.model_validate(EMBEDDING | {"input": prompt}).input == read


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "a"], ["a", [1]], [-1], [1.5], [True], {"a": 1}, 3, ["a"] * 2049])
def test_prompts_of_other_types_are_rejected(prompt: Any) -> None:
    assert refusal(CompletionRequest, COMPLETION | {"prompt": prompt}).param == "prompt"
    assert refusal(EmbeddingRequest, EMBEDDING | {"input": prompt}).param == "input"


@pytest.mark.parametrize(
    ("given", "expected"), [([], "input is empty"), ([[]], "input is empty"), (["a"] * 2049, "has 2049 inputs")]
)
def test_wrong_inputs_are_refused_with_the_reason(given: Any, expected: str) -> None:
    assert expected in refusal(EmbeddingRequest, EMBEDDING | {"input": given}).message


def test_a_completion_request_can_score_a_prompt_without_new_tokens() -> None:
    made = sampling(CompletionRequest, COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 5})
    assert (made.max_tokens, made.echo, made.top_logprobs) == (0, True, 5)
    assert sampling(CompletionRequest, COMPLETION | {"max_tokens": 5, "max_completion_tokens": 3}).max_tokens == 3


@pytest.mark.parametrize(
    "more", [{"max_tokens": 0}, {"best_of": 3}, {"suffix": "x"}, {"logprobs": 21}, {"logprobs": True}], ids=str
)
def test_options_that_completions_do_not_support_are_rejected(more: dict[str, Any]) -> None:
    assert refusal(CompletionRequest, COMPLETION | more).param in more


def test_validation_stops_after_a_few_errors() -> None:
    wrong = CHAT | {"messages": [{"role": "user", "content": 1}] * 10_000}
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate(wrong)
    assert found.value.error_count() < 5
    assert "at most 100 fields" in refusal(ChatRequest, CHAT | {f"field{n}": 1 for n in range(10_000)}).message
