"""Parse prompts and answers, which can be text or messages, and remove a repeated prompt from an answer.

Invalid prompts and answers raise RecordError.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from sage.libs.finetune.data.messages import Conversation, Message, read_conversation, read_message
from sage.libs.finetune.data.values import RecordError, text_of, unpacked


def prompt_of(value: Any, where: str) -> Conversation:
    """Parse a prompt. A text becomes a user message, unless the text is a JSON list of messages."""
    messages = _packed_messages(value)
    return _turns(value if messages is None else messages, where, "user")


def answer_of(value: Any, where: str, prompt: Any) -> Conversation:
    """Parse the answer to a prompt.  prompt: the prompt field of the record, or None.

    A text usually becomes one assistant message. A text that is a JSON list of messages is parsed as messages in three
    cases: the prompt is also a JSON list of messages, one of the first two messages repeats the prompt, or the record has
    no prompt.
    """
    messages = _packed_messages(value)
    if messages is None or not (prompt is None or _packed_messages(prompt) or _says_again(messages, prompt)):
        return _turns(value, where, "assistant")
    return read_conversation(messages, where)


def parted(prompt: Sequence[Message], spoken: Sequence[Message], where: str) -> tuple[list[Message], list[Message]]:
    """Return the prompt and the answer.  spoken: the answer, possibly with the prompt before it."""
    prompt, spoken = list(prompt), list(spoken)
    for begin in (0, 1):  # the repeated prompt can come after a system message
        end = begin + len(prompt)
        if prompt and spoken[begin:end] == prompt and all(message["role"] == "system" for message in spoken[:begin]):
            return spoken[:end], spoken[end:]
    asked = list(takewhile(lambda message: message["role"] in ("system", "user"), spoken))
    if not prompt or (asked and prompt[-len(asked) :] == asked):
        return prompt or asked, spoken[len(asked) :]
    if asked:
        raise RecordError(
            f"{where}[0] is a {asked[0]['role']} message that differs from the prompt.",
            f"Copy the prompt into {where}[0], or remove {where}[0].",
        )
    return prompt, spoken


def has_content(message: Message) -> bool:
    """Return whether a message has text, tool calls or reasoning."""
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _turns(value: Any, where: str, role: str) -> Conversation:
    if _is_message(value):
        return read_message(value, where)
    if isinstance(value, list) and not all(isinstance(item, Mapping) and "type" in item for item in value):
        return read_conversation(value, where)
    return Conversation([{"role": role, "content": text_of(value, where)}], frozenset(), ())


def _packed_messages(value: Any) -> list[Any] | None:
    found = unpacked(value) if isinstance(value, str) else None
    return found if isinstance(found, list) and found and all(map(_is_message, found)) else None


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and bool({"role", "from"} & item.keys())


def _says_again(messages: list[Any], prompt: Any) -> bool:
    return any(prompt in (message.get("content"), message.get("value")) for message in messages[:2])
