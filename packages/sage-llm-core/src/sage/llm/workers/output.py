"""The required form of an answer (text, JSON for a schema, function calls), and a grammar for this form.

The grammars are written in llguidance's variant of Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sage.common.errors import ConfigError
from sage.llm.workers.answer_format import AnswerFormat

#: Options for JSON in grammars: allow only the whitespace that chat templates write. If more whitespace were allowed, a weak
#: model could write spaces until the token limit.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: Allowed number of calls after the first call. Without this limit, a weak model could repeat a call until the token limit.
_MORE_CALLS = "{0,15}"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Output:
    """The form that a request requires for its answer."""

    schema: dict[str, Any] | None = None  #: JSON schema of the text; None: any text
    functions: list[dict[str, Any]] = field(default_factory=list)  #: functions that can be called, as in OpenAI's `tools`
    must_call: bool = False  #: whether the answer must consist of calls
    may_call_several: bool = True

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Return the JSON schema of the parameters of each function."""
        return {function["name"]: function.get("parameters") or {} for function in self.functions}

    def grammar(self, answer_format: AnswerFormat, special: Mapping[str, int], *, is_reasoning: bool) -> str | None:
        """Return the grammar of the answer, or None if every text is allowed.

        special: the tokenizer's special tokens. Keys: texts. Values: token ids.
        is_reasoning: whether the prompt ends inside the reasoning.
        Raises ConfigError if the format in which the model writes calls cannot be enforced.
        """
        is_strict = any(function.get("strict") for function in self.functions)
        if self.schema is None and not (self.must_call or is_strict or (self.functions and not self.may_call_several)):
            return None
        rules = [] if self.schema is None else [f"json: {_json(self.schema)}"]
        ways = ["json"] if rules else []
        if self.functions:
            rules += self._call_rules(answer_format, special)
            if self.must_call:
                ways = ["calls"]
            elif ways:
                ways.append("calls")
            else:
                rules.append(f"TEXT: {_text_without(answer_format.call_open)}")
                ways = ["TEXT calls?"] if answer_format.call_open else ["TEXT", "calls"]
        rules.append(f"answer: {' | '.join(ways)}")
        if not answer_format.think_open:
            return "\n".join(["start: answer", *rules])
        opening = "" if is_reasoning else _marker(answer_format.think_open, special)
        thought = f"{opening} thought BLANK"
        rules += [_rule_until("thought", answer_format.think_close, special), "BLANK: /\\s{0,2}/"]
        return "\n".join([f"start: {thought} answer" if is_reasoning else f"start: ({thought})? answer", *rules])

    def _call_rules(self, answer_format: AnswerFormat, special: Mapping[str, int]) -> list[str]:
        if answer_format.calls == "other":
            raise ConfigError(
                code="unsupported_value",
                message="tools: SAGE cannot enforce the format in which this model writes tool calls.",
                hint="Omit 'strict', 'parallel_tool_calls' and 'tool_choice'.",
                param="tools",
            )
        opening, closing = (_marker(text, special) for text in answer_format.around)
        rules, names = [], []
        for number, function in enumerate(self.functions):
            before = f'{{"name": {json.dumps(function["name"])}, "{answer_format.arguments_key}": '
            names.append(f"function{number}")
            rules.append(f"{names[-1]}: {_literal(before)} arguments{number} {_literal('}')}")
            parameters = function.get("parameters") or _NO_ARGUMENTS
            rules.append(f"arguments{number}: {_json(parameters, is_lenient=not function.get('strict'))}")
        call = f"({' | '.join(names)})"
        if answer_format.calls == "list":
            several = f'(", " {call}){_MORE_CALLS}' if self.may_call_several else ""
            return [*rules, f'calls: {opening} "[" {call} {several} "]" {closing}']
        several = (
            f'("\\n"? {opening} {call} {closing}){_MORE_CALLS}' if self.may_call_several and answer_format.call_open else ""
        )
        return [*rules, f"calls: {opening} {call} {closing} {several}"]


def _json(schema: Mapping[str, Any], *, is_lenient: bool = False) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {**_COMPACT, "lenient": is_lenient}})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _marker(text: str, special: Mapping[str, int]) -> str:
    """Return a grammar expression that matches a marker, which can contain special tokens and other text."""
    names = sorted((name for name in special if name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else _literal(part) for part in parts if part)


def _rule_until(name: str, marker: str, special: Mapping[str, int]) -> str:
    """Return a grammar rule that matches any text up to a marker, including the marker."""
    if marker in special:
        return f"{name}: /(?s:.*)/ <[{special[marker]}]>"
    return f"{name}[lazy]: /(?s:.*){_pattern(marker)}/"


def _text_without(marker: str | None) -> str:
    """Return a grammar expression that matches any text without a call.

    marker: text at the beginning of a call. Without a marker, a call begins with `{` or `[`.
    """
    return f"/(?s:.*)/ & ~/(?s:.*){_pattern(marker)}(?s:.*)/" if marker else r"/([^\s{\[](?s:.*))?/"


def _pattern(text: str) -> str:
    return re.sub(r"([^\w<> ])", r"\\\1", text)
