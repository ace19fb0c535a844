"""Records of the methods that learn from what is better: pairs of answers, answers with a verdict, bare prompts.

Each becomes what TRL takes: conversations, as lists of messages.
"""

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
from sage.libs.finetune.data.prompts import answer_of, parted, prompt_of, says_something
from sage.libs.finetune.data.tools import tools_of
from sage.libs.finetune.data.values import RecordError, check_encodable, kind_of

Row = dict[str, Any]
#: How a run learns: from answers, or by one of TRL's methods.
Method = Literal["sft", "dpo", "orpo", "kto", "grpo"]
#: Where a conversation stands that is not split into prompt and answer, as LLaMA-Factory has it.
_CONVERSATIONS = ("conversations", "messages")
_ASKED = ("instruction", "input", "history")
_PROMPT_HINT = "Give it, or begin the conversations of the answers with the same messages."


def parser_of(method: Method) -> Callable[[Any], Parsed]:
    """Return what makes a sample of a record, and names its format; it raises RecordError."""
    match method:
        case "sft":
            return parse_record
        case "dpo":
            return lambda record: _pair(present_fields(record), method, "tools", "functions")
        case "orpo":  # TRL renders it without tools
            return lambda record: _pair(present_fields(record), method)
        case "kto":
            return lambda record: _verdict(present_fields(record))
        case "grpo":
            return lambda record: _prompt(present_fields(record))


def _pair(record: Record, method: Method, *tools: str) -> Parsed:
    _need(record, method, "chosen", "rejected")
    prompt, fields = _asked(record)
    answers = {}
    contexts = []
    for name in ("chosen", "rejected"):
        turns = answer_of(record[name], name, record.get("prompt", prompt or None))
        context, answers[name] = parted(prompt, turns.messages, name)
        contexts.append(context)
    if contexts[0] != contexts[1]:
        if not prompt:
            raise RecordError("'prompt' is not there, and 'chosen' and 'rejected' begin differently.", _PROMPT_HINT)
        raise RecordError("'chosen' and 'rejected' do not both repeat the prompt as it is.", "Remove it from them.")
    shared = _shared(answers["chosen"], answers["rejected"])
    context = _context(contexts[0] + answers["chosen"][:shared])
    row: Row = {"prompt": context, **{name: _answer(answer[shared:], name) for name, answer in answers.items()}}
    if row["chosen"] == row["rejected"]:
        raise RecordError("'chosen' and 'rejected' are the same: there is nothing to learn from them.")
    # Beside a prompt, `messages` is the better answer's conversation once more.
    return _parsed("preference_pair", row, record, ("chosen", "rejected", "messages", *fields), tools)


def _verdict(record: Record) -> Parsed:
    label_field = "kto_tag" if "kto_tag" in record and "label" not in record else "label"
    answer_field = next((name for name in ("completion", "output", *_CONVERSATIONS) if name in record), "completion")
    _need(record, "kto", answer_field, label_field)
    said = record[label_field]
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(said).lower())
    if label is None:
        raise RecordError(f"'{label_field}' must be true or false, found {kind_of(said)}.")
    if answer_field in _CONVERSATIONS:
        fields: tuple[str, ...] = ("system",)
        context, answer = parted([], conversation_of(record, answer_field).messages, answer_field)
    else:
        prompt, fields = _asked(record)
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
    _need(record, "grpo", "prompt")
    check_encodable({name: value for name, value in record.items() if name != "prompt"}, "the record")
    return Parsed("prompt", {**record, "prompt": _context(prompt_of(record["prompt"], "prompt").messages)})


def _asked(record: Record) -> tuple[list[Message], tuple[str, ...]]:
    """Return what stands before the answer, or nothing, and the fields that say so."""
    if "prompt" in record:
        return behind_system(prompt_of(record["prompt"], "prompt"), record, "prompt").messages, ("prompt", "system")
    if field := next((name for name in _CONVERSATIONS if name in record), None):
        return conversation_of(record, field).messages, (field, "system")
    return (alpaca_question(record), (*_ASKED, "system")) if "instruction" in record else ([], ())


def _need(record: Record, method: Method, *fields: str) -> None:
    if missing := [field for field in fields if field not in record]:
        raise RecordError(f"{method} needs the fields {', '.join(fields)}; {', '.join(missing)} is not there.")


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Return how many messages two answers begin with alike; the last of each is left out."""
    alike = 0
    while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
        alike += 1
    return alike


def _context(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RecordError("'prompt' is not there.", _PROMPT_HINT)
    return _said(messages, "prompt")


def _answer(messages: list[Message], where: str) -> list[Message]:
    if other := next((message["role"] for message in messages if message["role"] in ("system", "user")), None):
        raise RecordError(f"'{where}' has a {other} message inside the answer.", "Move it into the prompt.")
    return _said(messages, where)


def _said(messages: list[Message], where: str) -> list[Message]:
    if not any(map(says_something, messages)):
        raise RecordError(f"'{where}' is empty.")
    return messages


def _parsed(name: str, row: Row, record: Record, fields: tuple[str, ...], tools: tuple[str, ...]) -> Parsed:
    if tools and (found := tools_of(record)):
        row["tools"] = json.dumps(found)  # as text: columns of a table would fill in each other's keys
    return Parsed(name, row, ignored_fields(record, {*fields, *tools}))
