"""Which format a record has, told from its fields, and what chat it stands for.

A format is a pair of functions: does this record look like it, and what does it say. To add one, write the pair and
put it into `FORMATS`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sage.libs.finetune.data.samples import Chat

Record = Mapping[str, Any]
Message = dict[str, Any]
Content = Chat | str

ROLES = ("system", "user", "assistant", "tool")
#: Other names that the field uses for the four roles.
_ROLE_ALIASES = {
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


class RecordError(ValueError):
    """A record that cannot be trained on; the message names the field, the hint the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Format(NamedTuple):
    """One dataset format."""

    name: str
    matches: Callable[[Record], bool]
    parse: Callable[[Record], Content]


def parse_record(record: Any) -> tuple[str, Content]:
    """Return the name of a record's format and what it says.

    Raises RecordError.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"a JSON object is expected, found {_kind(record)}.")
    present = {key: value for key, value in record.items() if value is not None}
    for candidate in FORMATS:
        if candidate.matches(present):
            content = candidate.parse(present)
            if isinstance(content, Chat):
                _check_chat(content.messages)
            return candidate.name, content
    raise RecordError(
        f"no known format has the fields {', '.join(sorted(map(str, present))) or '(none)'}.",
        "Use messages (OpenAI), conversations (ShareGPT), instruction and output (Alpaca), prompt and completion, or text.",
    )


def _parse_messages(record: Record) -> Content:
    items = _list(record["messages"], "messages")
    messages = [message_of(item, f"messages[{index}]") for index, item in enumerate(items)]
    untrained = frozenset(i for i, item in enumerate(items) if item.get("weight") == 0)
    return Chat(messages, _tools(record), untrained)


def _parse_sharegpt(record: Record) -> Content:
    items = _list(record["conversations"], "conversations")
    messages = [_sharegpt_message(item, f"conversations[{index}]") for index, item in enumerate(items)]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(record["system"], "system")})
    return Chat(messages, _tools(record))


def _parse_alpaca(record: Record) -> Content:
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": text_of(record["system"], "system")})
    for index, turn in enumerate(_list(record.get("history") or [], "history")):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecordError(f"history[{index}] must be a pair [question, answer].")
        messages += [
            {"role": "user", "content": text_of(turn[0], f"history[{index}][0]")},
            {"role": "assistant", "content": text_of(turn[1], f"history[{index}][1]")},
        ]
    question = text_of(record["instruction"], "instruction")
    if record.get("input"):
        question = f"{question}\n{text_of(record['input'], 'input')}"
    answer = text_of(record["output"], "output")
    return Chat([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _parse_prompt_completion(record: Record) -> Content:
    prompt, completion = unpacked(record["prompt"]), unpacked(record["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return _parse_messages({**record, "messages": [*prompt, *completion]})
    user = {"role": "user", "content": text_of(prompt, "prompt")}
    return Chat([user, {"role": "assistant", "content": text_of(completion, "completion")}])


def _parse_text(record: Record) -> Content:
    text = text_of(record["text"], "text")
    if not text.strip():
        raise RecordError("'text' is empty.", "Remove the record.")
    return text


#: Tried in this order; the first that matches is the record's format.
FORMATS: tuple[Format, ...] = (
    Format("openai", lambda r: "messages" in r, _parse_messages),
    Format("sharegpt", lambda r: "conversations" in r, _parse_sharegpt),
    Format("alpaca", lambda r: "instruction" in r and "output" in r, _parse_alpaca),
    Format("prompt_completion", lambda r: "prompt" in r and "completion" in r, _parse_prompt_completion),
    Format("text", lambda r: "text" in r, _parse_text),
)


def _check_chat(messages: list[dict[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise RecordError(f"messages[{index}]: a system message may only come first.")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RecordError("no assistant turn: there is nothing to learn from it.", "Add the answer, or remove it.")
    if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise RecordError("every assistant turn is empty.", "Write the answer, or remove the record.")


def message_of(item: Any, where: str) -> Message:
    """Return a message in OpenAI's shape; where: its place, for the error. Raises RecordError."""
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} must be an object with role and content, found {_kind(item)}.")
    message: Message = {"role": _role(item.get("role"), f"{where}.role")}
    calls = item.get("tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    message["content"] = "" if calls and item.get("content") is None else text_of(item.get("content"), f"{where}.content")
    message.update({key: item[key] for key in ("name", "tool_call_id") if key in item})
    return message


def _sharegpt_message(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, Mapping) and "from" in item:
        if item["from"] == "function_call":
            call = unpacked(item.get("value"))
            return message_of({"role": "assistant", "content": None, "tool_calls": [{"function": call}]}, where)
        item = {"role": item["from"], "content": item.get("value")}
    return message_of(item, where)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{where}.function must be an object with name and arguments.")
    # OpenAI sends arguments as a JSON string; chat templates expect the object.
    return {"type": "function", "function": {**function, "arguments": unpacked(function.get("arguments", {}))}}


def _role(role: Any, where: str) -> str:
    name = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if name not in ROLES:
        raise RecordError(f"{where} is {json.dumps(role)}.", f"It must be one of {', '.join(ROLES)}.")
    return str(name)


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = unpacked(record.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("'tools' must be a list of objects.")
    return tools


def text_of(value: Any, where: str) -> str:
    """Return a text, of which OpenAI's parts are one too; where: its place, for the error. Raises RecordError."""
    if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise RecordError(f"{where} must be text, found {_kind(value)}.")
    return value


def _list(value: Any, where: str) -> list[Any]:
    value = unpacked(value)
    if not isinstance(value, list):
        raise RecordError(f"'{where}' must be a list, found {_kind(value)}.")
    return value


def unpacked(value: Any) -> Any:
    """Return what a JSON string holds where it holds a list or an object, as in a CSV cell; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _kind(value: Any) -> str:
    names = {type(None): "nothing", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
