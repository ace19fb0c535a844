"""Records of the methods that learn from what is better: pairs of answers, answers with a verdict, bare prompts.

Each becomes what TRL takes: conversations, as lists of messages.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from sage.libs.finetune.data.formats import Message, Record, RecordError, message_of, parse_record, text_of, unpacked

Row = dict[str, Any]
#: How a run learns: from answers, or by one of TRL's methods.
Method = Literal["sft", "dpo", "orpo", "kto", "grpo"]


def parser_of(method: Method) -> Callable[[Any], tuple[str, Any]]:
    """Return what makes a sample of a record, and names its format; it raises RecordError."""
    if method == "sft":
        return parse_record
    name, fields, parse = _PARSERS[method]

    def parsed(record: Any) -> tuple[str, Row]:
        present = {key: value for key, value in record.items() if value is not None} if isinstance(record, Mapping) else {}
        if missing := [field for field in fields if field not in present]:
            raise RecordError(f"{method} needs the fields {', '.join(fields)}; {', '.join(missing)} is not there.")
        return name, parse(present)

    return parsed


def _pair(record: Record) -> Row:
    chosen, rejected = unpacked(record["chosen"]), unpacked(record["rejected"])
    if "prompt" in record:
        prompt = _messages(record["prompt"], "prompt", "user")
    elif isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1 and chosen[:-1] == rejected[:-1]:
        prompt, chosen, rejected = _messages(chosen[:-1], "chosen", "user"), chosen[-1:], rejected[-1:]
    else:
        raise RecordError(
            "'prompt' is not there.", "Give it, or the same conversation in chosen and rejected up to the end."
        )
    row = {
        "prompt": prompt,
        "chosen": _messages(chosen, "chosen", "assistant"),
        "rejected": _messages(rejected, "rejected", "assistant"),
    }
    if row["chosen"] == row["rejected"]:
        raise RecordError("'chosen' and 'rejected' are the same: there is nothing to learn from them.")
    return row


def _verdict(record: Record) -> Row:
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(record["label"]).lower())
    if label is None:
        raise RecordError(f"'label' must be true or false, found {record['label']!r}.")
    return {
        "prompt": _messages(record["prompt"], "prompt", "user"),
        "completion": _messages(record["completion"], "completion", "assistant"),
        "label": label,
    }


def _prompt(record: Record) -> Row:
    return {**record, "prompt": _messages(record["prompt"], "prompt", "user")}


def _messages(value: Any, where: str, role: str) -> list[Message]:
    value = unpacked(value)
    if not isinstance(value, list):
        messages = [{"role": role, "content": text_of(value, where)}]
    else:
        messages = [message_of(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not messages or not any(message["content"].strip() for message in messages):
        raise RecordError(f"'{where}' is empty.")
    return messages


_PARSERS: Mapping[str, tuple[str, tuple[str, ...], Callable[[Record], Row]]] = {
    "dpo": ("preference_pair", ("chosen", "rejected"), _pair),
    "orpo": ("preference_pair", ("chosen", "rejected"), _pair),
    "kto": ("verdict", ("prompt", "completion", "label"), _verdict),
    "grpo": ("prompt", ("prompt",), _prompt),
}
