"""One conversation, whatever its turns are called: to messages in OpenAI's shape, with what is context only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sage.libs.finetune.data.tools import called_functions, tool_calls_of
from sage.libs.finetune.data.values import RecordError, kind_of, list_of, printable, shown, text_of, unpacked

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
#: Other names that the field uses for the four roles.
_ROLE_ALIASES = {
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "tool_result": "tool",
}  # fmt: skip
#: Turns whose text is a call, or a list of calls, of the assistant.
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
#: An answer is context only if one of these is 0 (a weight), or false (the others).
_FLAGS = ("weight", "loss", "train", "trainable", "training", "train_on_turn")
#: What the assistant thought, of which a message has one.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_INSTEAD_OF_CONTENT = {"tool_calls", "reasoning_content"}
_CONTENT = {"role", "content", "from", "value"}
_OF_ASSISTANT = {"tool_calls", "function_call", *_REASONING}
_DETAILS = {"name", "tool_call_id", *_OF_ASSISTANT, *_FLAGS}
#: Names of records and messages that say nothing to the model, and that nobody expects it to learn.
BOOKKEEPING = frozenset({
    "", "Unnamed: 0", "__index_level_0__", "_id", "conversation_id", "id", "idx", "index", "message_id", "prompt_id", "uuid",
})  # fmt: skip


class Conversation(NamedTuple):
    """What a list of turns says."""

    messages: list[Message]
    untrained: frozenset[int]  #: indexes of assistant messages that are context only
    ignored: tuple[str, ...]  #: names of the fields that have no effect

    def begun_with(self, messages: list[Message]) -> "Conversation":
        """Return the conversation behind some messages."""
        if not messages:
            return self
        untrained = frozenset(index + len(messages) for index in self.untrained)
        return Conversation([*messages, *self.messages], untrained, self.ignored)


class _Turn(NamedTuple):
    message: Message
    is_call: bool  #: of a turn that holds calls and nothing else
    untrained: bool
    ignored: list[str]


def read_conversation(value: Any, where: str) -> Conversation:
    """Return a conversation; where: the field that holds it. Raises RecordError that names the turn and its field."""
    items = _transposed(value) or list_of(value, where)
    return _read([(item, f"{where}[{index}]") for index, item in enumerate(items)], f"{where}[].")


def _transposed(value: Any) -> list[Any] | None:
    """Return the turns of a column that has a list for each of their fields, as older releases of `datasets` write it."""
    if not isinstance(value, Mapping) or not all(isinstance(column, list) for column in value.values()):
        return None
    if len({len(column) for column in value.values()}) != 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def read_message(value: Any, where: str) -> Conversation:
    """Return a conversation of one message; where: the field that holds it. Raises RecordError."""
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
                raise RecordError(f"{place} belongs to the answer before it, and only one of them is context.")
            messages[last] = _one_answer(messages[last], turn.message, place)
            continue
        messages.append(turn.message)
        if turn.untrained:
            untrained.add(last + 1)
    return Conversation(messages, frozenset(untrained), tuple(ignored))


def _turn(item: Any, where: str) -> _Turn:
    if not isinstance(item, Mapping):
        item = unpacked(item)  # as `datasets` writes a column of JSON
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
    if role != "assistant" and not untrained:  # that a question is context is so without saying
        ignored += flags
    return _Turn(message, is_call, untrained and role == "assistant", ignored)


def _add_details(message: Message, item: Mapping[str, Any], where: str, ignored: list[str]) -> None:
    """Give a message what its turn has besides role and content; what has no effect goes into `ignored`."""
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
    ignored += [name for name in item if name in unknown and _says_something(item[name])]


def _one_answer(answer: Message, call: Message, where: str) -> Message:
    """Return an answer with the calls that follow it: calls in a row, or a sentence and its calls, are one message."""
    if "reasoning_content" in call and answer.get("reasoning_content") != call["reasoning_content"]:
        raise RecordError(f"{where} belongs to the answer before it, and has reasoning of its own.")
    return {**answer, "tool_calls": [*answer.get("tool_calls", []), *call["tool_calls"]]}


def _role(role: Any, where: str) -> str:
    name = _ROLE_ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if name not in ROLES:
        raise RecordError(f"{where} is {shown(role)}.", f"It must be one of {', '.join(ROLES)}.")
    return str(name)


def _untrained(item: Mapping[str, Any], flags: list[str], where: str) -> bool:
    """Return whether the flags that a turn has say that it is context only."""
    said = {}
    for name in flags:
        value = item[name]
        if name == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise RecordError(f"{where}.weight is {shown(value)}.", "It must be 0 (context only) or 1.")
        if name != "weight" and not isinstance(value, bool):
            raise RecordError(f"{where}.{name} is {shown(value)}.", "It must be true or false (context only).")
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise RecordError(f"{where}: {' and '.join(said)} contradict each other.", "Keep one of them.")
    return False in said.values()


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    said = {name: text_of(item[name], f"{where}.{name}") for name in _REASONING if name in item}
    if len(set(said.values())) > 1:
        raise RecordError(f"{where}: {' and '.join(said)} say different things.", "Keep one of them.")
    return next(iter(said.values()), "")


def _says_something(value: Any) -> bool:
    return value not in (None, "", [], {})
