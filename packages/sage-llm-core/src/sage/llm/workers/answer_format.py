"""Detect from a model's chat template how the model writes tool calls and reasoning."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from sage.libs.models.chat import ChatFormat

_NAME, _VALUE, _THOUGHT = "zq7_call", "Zq7Zq7", "Zq8Zq8"
_DECODER = json.JSONDecoder()
#: Known texts before and after a tool call. These texts are needed if a template contains no code that writes calls, but
#: only describes calls in the system prompt (Granite 3, Phi-4).
_CALL_MARKERS = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<|tool_call|>", ""),
    ("[TOOL_CALLS]", ""),
)
_THINK_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
)


@dataclass(frozen=True)
class AnswerFormat:
    """The markers of tool calls and reasoning in a model's answers."""

    call_open: str | None = None  #: text before a call; "": the whole answer is a call; None: the model writes no calls
    call_close: str = ""  #: text after a call; "": a call ends at the next call or at the end of the answer
    #: `object`: each call is a JSON object. `list`: all calls are one JSON list. `other`: calls have another notation.
    calls: Literal["object", "list", "other"] = "other"
    arguments_key: str = "arguments"
    around: tuple[str, str] = ("", "")  #: text before and after a call, with whitespace as in the template
    think_open: str = ""  #: text before the reasoning; "": the model writes no reasoning
    think_close: str = ""

    @classmethod
    def of(cls, chat: ChatFormat) -> "AnswerFormat":
        """Return the format of a model's answers. The method runs the chat template, which can take long or never end."""
        template = str(chat.tokenizer.chat_template or "")
        fields = _call_in_template(chat) or _markers_of_calls(chat, template)
        if not fields and (declared := _declared_markers(chat.tokenizer, "tool_calls"))[0]:
            fields = {"call_open": declared[0], "call_close": declared[1]}
        opening, closing = _markers_of_reasoning(chat, template) or _declared_markers(chat.tokenizer, "reasoning_content")
        return cls(**fields, think_open=opening, think_close=closing)

    def special_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Return the ids of the special tokens in the markers. These tokens must stay in the text of an answer."""
        markers = [self.call_open or "", self.call_close, self.think_open, self.think_close, "[ARGS]", "[CALL_ID]"]
        special = set(tokenizer.all_special_ids)
        return frozenset(
            token
            for token, added in tokenizer.added_tokens_decoder.items()
            if token in special and added.content in "".join(markers)
        )


def _call_in_template(chat: ChatFormat) -> dict[str, Any]:
    asked = {"role": "user", "content": "Hi"}
    function = {"name": _NAME, "arguments": {"x": _VALUE}}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
    }
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": _NAME, "description": "d", "parameters": parameters}}]
    text = header = ""
    with contextlib.suppress(Exception):  # a template can raise any exception
        text = chat.render([asked, called], tools)
        header = chat.header([asked], tools, text)
    answer = text[len(header) :]
    if _NAME not in answer:
        return {}
    for at, character in enumerate(answer):
        if character in "[{":
            with contextlib.suppress(ValueError):
                value, length = _DECODER.raw_decode(answer[at:])
                call = value[0] if isinstance(value, list) and value else value
                if isinstance(call, dict) and _NAME in str(call):
                    return _json_call(chat, value, call, answer[:at], answer[at + length :])
    return next((
        {"call_open": opening, "call_close": closing} for opening, closing in _CALL_MARKERS
        if opening in answer and closing in answer
    ), {})  # fmt: skip


def _json_call(chat: ChatFormat, value: Any, call: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    end = chat.answer_end(calls=True)
    if end is not None:
        after = after.partition(chat.tokenizer.convert_ids_to_tokens(end))[0]
    key = next((key for key, part in call.items() if isinstance(part, dict) and part.get("x") == _VALUE), None)
    notation = "list" if isinstance(value, list) else "object"
    return {
        "call_open": before.strip(),
        "call_close": after.strip(),
        "around": (before, after if after.strip() else ""),
        "calls": notation if key and call.get("name") == _NAME else "other",
        "arguments_key": key or "arguments",
    }


def _declared_markers(tokenizer: Any, field: str) -> tuple[str, str]:
    declared = getattr(tokenizer, "response_template", None)
    spec = declared.get("fields", {}).get(field, {}) if isinstance(declared, dict) else {}
    opening, closing = spec.get("open"), spec.get("close", "")
    return (opening.strip(), closing.strip()) if isinstance(opening, str) and isinstance(closing, str) else ("", "")


def _markers_of_calls(chat: ChatFormat, template: str) -> dict[str, Any]:
    """Return the first pair in `_CALL_MARKERS` that the model knows.

    The model knows a pair if each marker of the pair occurs in the template, or is an added token of the tokenizer.
    Returns {} if the model knows no pair, or if the template does not use the variable `tools`.
    """
    known = {str(token) for token in chat.tokenizer.added_tokens_decoder.values()}
    for opening, closing in _CALL_MARKERS if "tools" in template else ():
        if all(not marker or marker in template or marker in known for marker in (opening, closing)):
            return {"call_open": opening, "call_close": closing}
    return {}


def _markers_of_reasoning(chat: ChatFormat, template: str) -> tuple[str, str] | None:
    text = ""
    answered = {"role": "assistant", "content": _VALUE, "reasoning_content": _THOUGHT}
    with contextlib.suppress(Exception):  # a template can raise any exception
        text = chat.render([{"role": "user", "content": "Hi"}, answered])
    before, _, after = text.partition(_THOUGHT)
    for opening, closing in _THINK_MARKERS:
        if (opening in before and closing in after) or (opening in template and closing in template):
            return opening, closing
    return None
