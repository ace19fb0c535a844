"""Parse the records of DPO, ORPO, KTO and GRPO (pairs of answers, labelled answers, prompts) into the formats of TRL."""

import json
from collections.abc import Callable
from typing import Any, Literal

from sage.libs.finetune.data.formats import (
    Parsed,
    Record,
    alpaca_question,
    behind_system,
    conversation_of,
    ignored_fields,
    parse_record,
    present_fields,
)
from sage.libs.finetune.data.messages import Message
from sage.libs.finetune.data.prompts import answer_of, has_content, parted, prompt_of
from sage.libs.finetune.data.tools import tools_of
from sage.libs.finetune.data.values import RecordError, check_encodable, kind_of

Row = dict[str, Any]
#: Training method: supervised fine-tuning, or one of TRL's methods.
Method = Literal["sft", "dpo", "orpo", "kto", "grpo"]
#: Fields that contain a list of messages. The answer is in this list or in another field.
#: LLaMA-Factory uses the same fields.
_CONVERSATIONS = ("conversations", "messages")
_ASKED = ("instruction", "input", "history")
_PROMPT_HINT = "Add a prompt, or begin both answers with the same messages."


def parser_of(method: Method) -> Callable[[Any], Parsed]:
    """Return the parser for the records of a training method. The parser raises RecordError for invalid records."""
    match method:
        case "sft":
            return parse_record
        case "dpo":
            return lambda record: _pair(present_fields(record), method, "tools", "functions")
        case "orpo":  # TRL's ORPO trainer renders prompts without tools
            return lambda record: _pair(present_fields(record), method)
        case "kto":
            return lambda record: _verdict(present_fields(record))
        case "grpo":
            return lambda record: _prompt(present_fields(record))


def _pair(record: Record, method: Method, *tools: str) -> Parsed:
    _require(record, method, "chosen", "rejected")
    prompt, fields = _prompt_of_pair(record)
    answers = {}
    contexts = []
    for name in ("chosen", "rejected"):
        turns = answer_of(record[name], name, record.get("prompt", prompt or None))
        context, answers[name] = parted(prompt, turns.messages, name)
        contexts.append(context)
    if contexts[0] != contexts[1]:
        if not prompt:
            raise RecordError(
                "'prompt' is missing, and 'chosen' and 'rejected' begin with different messages.", _PROMPT_HINT
            )
        raise RecordError("Only one of 'chosen' and 'rejected' repeats the prompt.", "Remove the repeated prompt.")
    shared = _common_length(answers["chosen"], answers["rejected"])
    context = _context(contexts[0] + answers["chosen"][:shared])
    row: Row = {"prompt": context, **{name: _answer(answer[shared:], name) for name, answer in answers.items()}}
    if row["chosen"] == row["rejected"]:
        raise RecordError("'chosen' and 'rejected' are equal, so there is nothing to learn.")
    # `messages` is not reported as ignored, because in some datasets it only repeats the prompt and the chosen answer.
    return _parsed("preference_pair", row, record, ("chosen", "rejected", "messages", *fields), tools)


def _verdict(record: Record) -> Parsed:
    label_field = "kto_tag" if "kto_tag" in record and "label" not in record else "label"
    answer_field = next((name for name in ("completion", "output", *_CONVERSATIONS) if name in record), "completion")
    _require(record, "kto", answer_field, label_field)
    label_value = record[label_field]
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(label_value).lower())
    if label is None:
        raise RecordError(f"'{label_field}' must be true or false, found {kind_of(label_value)}.")
    if answer_field in _CONVERSATIONS:
        fields: tuple[str, ...] = ("system",)
        context, answer = parted([], conversation_of(record, answer_field).messages, answer_field)
    else:
        prompt, fields = _prompt_of_pair(record)
        turns = answer_of(record[answer_field], answer_field, record.get("prompt", prompt))
        context, answer = parted(prompt, turns.messages, answer_field)
    asked = max((index + 1 for index, message in enumerate(answer) if message["role"] in ("system", "user")), default=0)
    row = {
        "prompt": _context(context + answer[:asked]),
        "completion": _answer(answer[asked:], answer_field),
        "label": label,
    }
    return _parsed("verdict", row, record, (label_field, answer_field, *fields), ("tools", "functions"))


def _prompt(record: Record) -> Parsed:
    _require(record, "grpo", "prompt")
    check_encodable({name: value for name, value in record.items() if name != "prompt"}, "the record")
    return Parsed("prompt", {**record, "prompt": _context(prompt_of(record["prompt"], "prompt").messages)})


def _prompt_of_pair(record: Record) -> tuple[list[Message], tuple[str, ...]]:
    """Return the messages before the answer ([] if there are none), and the names of the fields with these messages."""
    if "prompt" in record:
        return behind_system(prompt_of(record["prompt"], "prompt"), record, "prompt").messages, ("prompt", "system")
    if field := next((name for name in _CONVERSATIONS if name in record), None):
        return conversation_of(record, field).messages, (field, "system")
    return (alpaca_question(record), (*_ASKED, "system")) if "instruction" in record else ([], ())


def _require(record: Record, method: Method, *fields: str) -> None:
    if missing := [field for field in fields if field not in record]:
        raise RecordError(f"{method} needs the fields {', '.join(fields)}; missing: {', '.join(missing)}.")


def _common_length(chosen: list[Message], rejected: list[Message]) -> int:
    """Return how many messages at the beginning of two answers are equal. The last message of an answer never counts."""
    alike = 0
    while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
        alike += 1
    return alike


def _context(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RecordError("'prompt' is missing.", _PROMPT_HINT)
    return _not_empty(messages, "prompt")


def _answer(messages: list[Message], where: str) -> list[Message]:
    if other := next((message["role"] for message in messages if message["role"] in ("system", "user")), None):
        raise RecordError(f"'{where}' has a {other} message inside the answer.", "Move this message into the prompt.")
    return _not_empty(messages, where)


def _not_empty(messages: list[Message], where: str) -> list[Message]:
    if not any(map(has_content, messages)):
        raise RecordError(f"'{where}' is empty.")
    return messages


def _parsed(name: str, row: Row, record: Record, fields: tuple[str, ...], tools: tuple[str, ...]) -> Parsed:
    if tools and (found := tools_of(record)):
        row["tools"] = json.dumps(found)  # as JSON text: a struct column would add null values for missing keys
    return Parsed(name, row, ignored_fields(record, {*fields, *tools}))
