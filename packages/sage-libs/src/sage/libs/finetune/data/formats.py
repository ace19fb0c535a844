"""Detect the format of a record from its fields, and convert the record to a chat or a text.

Invalid records raise RecordError. To add a format, add an entry to `FORMATS`.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from sage.libs.finetune.data.messages import BOOKKEEPING, Conversation, Message, read_conversation
from sage.libs.finetune.data.prompts import answer_of, has_content, parted, prompt_of
from sage.libs.finetune.data.samples import Chat
from sage.libs.finetune.data.tools import tools_of
from sage.libs.finetune.data.values import RecordError, kind_of, list_of, printable, text_of, unpacked

Record = Mapping[str, Any]
Content = Chat | str
#: Fields with images, videos or audio, which are not supported.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TOOLS = ("tools", "functions")
_HARMLESS = {*BOOKKEEPING, *_MEDIA}


class Parsed(NamedTuple):
    """A parsed record."""

    format: str
    content: Any
    ignored: tuple[str, ...] = ()  #: names of the fields that have no effect


class Format(NamedTuple):
    """One dataset format."""

    name: str
    matches: Callable[[Record], bool]
    parse: Callable[[Record], Content]
    fields: frozenset[str]  #: names of the fields that have an effect


def parse_record(record: Any) -> Parsed:
    """Parse a record of any format; raises RecordError."""
    present = present_fields(record)
    for candidate in FORMATS:
        if candidate.matches(present):
            content = candidate.parse(present)
            ignored = ignored_fields(present, candidate.fields)
            if isinstance(content, Chat):
                _check_chat(content.messages)
                ignored += content.ignored
                content = Chat(content.messages, content.tools, content.untrained, ignored)
            return Parsed(candidate.name, content, ignored)
    names = ", ".join(sorted(map(printable, present))) or "(none)"
    if {"chosen", "rejected"} <= present.keys():
        raise RecordError("'chosen' and 'rejected' are only for the methods dpo and orpo.", "Select a method with --method.")
    raise RecordError(
        f"no known format has the fields {names}.",
        "Use the fields of one format: messages (OpenAI); conversations (ShareGPT); instruction and output (Alpaca); "
        "prompt and completion; text.",
    )


def present_fields(record: Any) -> dict[str, Any]:
    """Return the non-null fields of a record. Raises RecordError if the record is not an object, or if it contains media."""
    if not isinstance(record, Mapping):
        raise RecordError(f"a JSON object is expected, found {kind_of(record)}.")
    present = {key: value for key, value in record.items() if value is not None}
    if media := [name for name in _MEDIA if unpacked(present.get(name))]:
        raise RecordError(f"the field '{media[0]}' is not supported: only text can be trained on.", "Remove the record.")
    return present


def ignored_fields(present: Record, used: Set[str]) -> tuple[str, ...]:
    """Return the names of the non-empty fields that have no effect, except bookkeeping fields such as ids."""
    unknown = present.keys() - used - _HARMLESS
    return tuple(printable(name) for name in present if name in unknown and present[name] not in ("", [], {}))


def _chat(record: Record, conversation: Conversation) -> Chat:
    return Chat(conversation.messages, tools_of(record), conversation.untrained, conversation.ignored)


def conversation_of(record: Record, field: str) -> Conversation:
    """Parse the conversation in a field, and prepend the record's system message if there is one."""
    return behind_system(read_conversation(record[field], field), record, field)


def behind_system(conversation: Conversation, record: Record, where: str) -> Conversation:
    """Insert the record's system message at the beginning of the conversation, unless the message is there already.

    Raises RecordError if the conversation begins with a different system message.
    """
    system = system_of(record)
    if system and conversation.messages[:1] == system:
        return conversation
    if system and conversation.messages and conversation.messages[0]["role"] == "system":
        raise RecordError(f"'system' and {where}[0] are two different system messages.", "Keep one of them.")
    return conversation.with_prefix(system)


def system_of(record: Record) -> list[Message]:
    """Return a list with the system message of a record's field `system`, or [] if the field is missing or empty."""
    text = text_of(record.get("system", ""), "system")
    return [{"role": "system", "content": text}] if text else []


def alpaca_question(record: Record) -> list[Message]:
    """Return the messages before the answer of an Alpaca record."""
    messages = system_of(record)
    for index, turn in enumerate(list_of(record.get("history") or [], "history")):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecordError(f"history[{index}] must be a pair [question, answer].")
        messages += [
            {"role": "user", "content": text_of(turn[0], f"history[{index}][0]")},
            {"role": "assistant", "content": text_of(turn[1], f"history[{index}][1]")},
        ]
    question = text_of(record["instruction"], "instruction")
    if given := text_of(record.get("input", ""), "input"):
        question = f"{question}\n{given}"
    return [*messages, {"role": "user", "content": question}]


def _parse_messages(record: Record) -> Content:
    return _chat(record, conversation_of(record, "messages"))


def _parse_sharegpt(record: Record) -> Content:
    return _chat(record, conversation_of(record, "conversations"))


def _parse_alpaca(record: Record) -> Content:
    answer = {"role": "assistant", "content": text_of(record["output"], "output")}
    return Chat([*alpaca_question(record), answer], tools_of(record))


def _parse_prompt_completion(record: Record) -> Content:
    prompt = behind_system(prompt_of(record["prompt"], "prompt"), record, "prompt")
    completion = answer_of(record["completion"], "completion", record["prompt"])
    context, answer = parted(prompt.messages, completion.messages, "completion")
    # The model is not trained on assistant messages in the prompt.
    spoken = {index for index, message in enumerate(context) if message["role"] == "assistant"}
    moved = len(context) + len(answer) - len(completion.messages)
    untrained = frozenset(spoken | {index + moved for index in completion.untrained})
    return Chat([*context, *answer], tools_of(record), untrained, prompt.ignored + completion.ignored)


def _parse_text(record: Record) -> Content:
    text = text_of(record["text"], "text")
    if not text.strip():
        raise RecordError("'text' is empty.", "Remove the record.")
    return text


#: All formats, in the order in which they are tried; the first match is used.
FORMATS: tuple[Format, ...] = (
    Format("openai", lambda r: "messages" in r, _parse_messages, frozenset({"messages", "system", *_TOOLS})),
    Format("sharegpt", lambda r: "conversations" in r, _parse_sharegpt, frozenset({"conversations", "system", *_TOOLS})),
    Format(
        "alpaca",
        lambda r: "instruction" in r and "output" in r,
        _parse_alpaca,
        frozenset({"instruction", "input", "output", "system", "history", *_TOOLS}),
    ),
    Format(
        "prompt_completion",
        lambda r: "prompt" in r and "completion" in r,
        _parse_prompt_completion,
        frozenset({"prompt", "completion", "system", *_TOOLS}),
    ),
    Format("text", lambda r: "text" in r, _parse_text, frozenset({"text"})),
)


def _check_chat(messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise RecordError(f"messages[{index}]: a system message must be the first message.")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RecordError("no assistant turn, so there is nothing to learn.", "Add the answer, or remove the record.")
    if not any(map(has_content, answers)):
        raise RecordError("every assistant turn is empty.", "Add the answer, or remove the record.")
