"""Convert conversations of all dataset formats to messages in OpenAI's format. Invalid turns raise RecordError."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sage.libs.finetune.data.tools import called_functions, tool_calls_of
from sage.libs.finetune.data.values import RecordError, kind_of, list_of, printable, shown, text_of, unpacked

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
#: Other common names of the four roles.
_ROLE_ALIASES = {
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "tool_result": "tool",
}  # fmt: skip
#: Roles of turns whose text contains one or more tool calls of the assistant.
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
#: Fields that can exclude an answer from training: `weight` if its value is 0, any other field if its value is false.
_FLAGS = ("weight", "loss", "train", "trainable", "training", "train_on_turn")
#: Possible names of the field that contains the assistant's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_INSTEAD_OF_CONTENT = {"tool_calls", "reasoning_content"}
_CONTENT = {"role", "content", "from", "value"}
_OF_ASSISTANT = {"tool_calls", "function_call", *_REASONING}
_DETAILS = {"name", "tool_call_id", *_OF_ASSISTANT, *_FLAGS}
#: Fields that contain no text for the model, such as ids. These fields are ignored and not reported.
BOOKKEEPING = frozenset({
    "", "Unnamed: 0", "__index_level_0__", "_id", "conversation_id", "id", "idx", "index", "message_id", "prompt_id", "uuid",
})  # fmt: skip


class Conversation(NamedTuple):
    """A parsed list of turns."""

    messages: list[Message]
    untrained: frozenset[int]  #: indexes of assistant messages that are excluded from training
    ignored: tuple[str, ...]  #: names of the fields that have no effect

    def with_prefix(self, messages: list[Message]) -> "Conversation":
        """Return this conversation with `messages` inserted at the beginning."""
        if not messages:
            return self
        untrained = frozenset(index + len(messages) for index in self.untrained)
        return Conversation([*messages, *self.messages], untrained, self.ignored)


class _Turn(NamedTuple):
    message: Message
    is_call: bool  #: whether the turn contains only tool calls
    untrained: bool
    ignored: list[str]


def read_conversation(value: Any, where: str) -> Conversation:
    """Parse a list of turns.  where: name of the record's field. Raises RecordError if a turn is invalid."""
    items = _transposed(value) or list_of(value, where)
    return _read([(item, f"{where}[{index}]") for index, item in enumerate(items)], f"{where}[].")


def _transposed(value: Any) -> list[Any] | None:
    """Convert an object such as `{"role": [...], "content": [...]}` to a list of turns.

    Old versions of `datasets` create such objects. Returns None if `value` is not such an object.
    """
    if not isinstance(value, Mapping) or not all(isinstance(column, list) for column in value.values()):
        return None
    if len({len(column) for column in value.values()}) != 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def read_message(value: Any, where: str) -> Conversation:
    """Parse one message as a conversation.  where: name of the record's field."""
    return _read([(value, where)], f"{where}.")


def _read(items: list[tuple[Any, str]], prefix: str) -> Conversation:
    messages: list[Message] = []
    untrained: set[int] = set()
    ignored: dict[str, None] = {}
    for item, place in items:
        turn = _turn(item, place)
        if turn.ignored:
            ignored.update(dict.fromkeys(prefix + printable(name) for name in turn.ignored))
        last = len(messages) - 1
        if turn.is_call and messages and messages[last]["role"] == "assistant":
            if turn.untrained != (last in untrained):
                raise RecordError(
                    f"{place} continues the previous answer, but only one of the two turns is excluded from training.",
                    "Give both turns the same weight.",
                )
            messages[last] = _merged_answer(messages[last], turn.message, place)
            continue
        messages.append(turn.message)
        if turn.untrained:
            untrained.add(last + 1)
    return Conversation(messages, frozenset(untrained), tuple(ignored))


def _turn(item: Any, where: str) -> _Turn:
    if not isinstance(item, Mapping):
        item = unpacked(item)  # a turn in a JSON column of `datasets` is a JSON text
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} must be an object with role and content, found {kind_of(item)}.")
    if None in item.values():
        item = {key: value for key, value in item.items() if value is not None}
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = item.get(role_key)
    is_call = role in _CALL_ROLES
    if is_call:
        role = "assistant"
    elif role not in ROLES:
        role = _role(role, f"{where}.{role_key}")
    message: Message = {"role": role, "content": ""}
    ignored: list[str] = []
    if is_call:
        message["tool_calls"] = called_functions(item.get(content_key), f"{where}.{content_key}", ignored)
    if item.keys() - _CONTENT:
        _add_details(message, item, where, ignored)
    if not is_call and (content_key in item or not message.keys() & _INSTEAD_OF_CONTENT):
        message["content"] = text_of(item.get(content_key), f"{where}.{content_key}")
    flags = [name for name in _FLAGS if name in item]
    untrained = bool(flags) and _untrained(item, flags, where)
    if role != "assistant" and not untrained:  # if the turn is not an answer, a flag such as `train: true` has no effect
        ignored += flags
    return _Turn(message, is_call, untrained and role == "assistant", ignored)


def _add_details(message: Message, item: Mapping[str, Any], where: str, ignored: list[str]) -> None:
    unknown = item.keys() - _CONTENT - BOOKKEEPING - _DETAILS
    if message["role"] != "assistant":
        unknown |= item.keys() & _OF_ASSISTANT
    else:
        if "tool_calls" not in message and (calls := tool_calls_of(item, where, ignored)):
            message["tool_calls"] = calls
        if reasoning := _reasoning(item, where):
            message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if key in item:
            message[key] = text_of(item[key], f"{where}.{key}")
    ignored += [name for name in item if name in unknown and _has_content(item[name])]


def _merged_answer(answer: Message, call: Message, where: str) -> Message:
    """Return an answer with the tool calls of the next turn added. In OpenAI's format, both turns are one message."""
    if "reasoning_content" in call and answer.get("reasoning_content") != call["reasoning_content"]:
        raise RecordError(f"{where} continues the previous answer, but has different reasoning.")
    return {**answer, "tool_calls": [*answer.get("tool_calls", []), *call["tool_calls"]]}


def _role(role: Any, where: str) -> str:
    name = _ROLE_ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if name not in ROLES:
        raise RecordError(f"{where} is {shown(role)}.", f"The role must be one of {', '.join(ROLES)}.")
    return str(name)


def _untrained(item: Mapping[str, Any], flags: list[str], where: str) -> bool:
    values = {}
    for name in flags:
        value = item[name]
        if name == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise RecordError(
                f"{where}.weight is {shown(value)}.", "The weight must be 1, or 0 to exclude the turn from training."
            )
        if name != "weight" and not isinstance(value, bool):
            raise RecordError(
                f"{where}.{name} is {shown(value)}.", "The value must be true, or false to exclude the turn from training."
            )
        values[name] = bool(value)
    if len(set(values.values())) > 1:
        raise RecordError(f"{where}: the fields {' and '.join(values)} contradict each other.", "Keep one of them.")
    return False in values.values()


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    values = {name: text_of(item[name], f"{where}.{name}") for name in _REASONING if name in item}
    if len(set(values.values())) > 1:
        raise RecordError(f"{where}: the fields {' and '.join(values)} differ.", "Keep one of them.")
    return next(iter(values.values()), "")


def _has_content(value: Any) -> bool:
    return value not in (None, "", [], {})
