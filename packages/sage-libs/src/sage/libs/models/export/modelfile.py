"""Write a Modelfile for Ollama.

The Modelfile contains a Go template. This module derives the Go template from the model's chat template. Both templates
must produce the same prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sage.common.errors import ModelError
from sage.libs.models.chat import ChatFormat, Message

#: Placeholders for the contents of messages. No template contains them.
_SYSTEM, _USER, _ANSWER, _NEXT = "Zq7s", "Zq7u", "Zq7a", "Zq7n"
_TEMPLATE = (
    "{{- if not .System }}{{ %(head)s }}{{ end }}{{- $system := .System }}"
    "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{- if eq .Role "user" }}{{ %(user)s }}%(joined)s{{ .Content }}{{ %(user_end)s }}'
    '{{- else if eq .Role "assistant" }}{{ %(answer)s }}{{ .Content }}{{ if not $last }}{{ %(answer_end)s }}{{ end }}'
    "%(system_branch)s{{- end }}"
    '{{- if and $last (ne .Role "assistant") }}{{ %(prompt)s }}{{ end }}{{- end }}'
)
_SYSTEM_BRANCH = '{{- else if eq .Role "system" }}{{ %(system)s }}{{ .Content }}{{ %(system_end)s }}'
_JOINED = '{{ if $system }}{{ $system }}{{ %(system_end)s }}{{ $system = "" }}{{ end }}'


@dataclass(frozen=True)
class Turns:
    """The constant texts that a chat template writes before and after the contents of messages."""

    head: str  #: text before the first message, if this message is not a system message
    system: tuple[str, str] | None  #: texts before and after a system message; None: no system messages are supported
    is_joined: bool  #: whether the system prompt is part of the first user message
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str  #: text at the end of a prompt, before the answer

    def render(self, messages: Sequence[Message]) -> str:
        """Render a chat and the generation prompt in the same way as the Go template."""
        has_system = messages[0]["role"] == "system"
        text, system = "" if has_system else self.head, ""
        for message in messages:
            match message["role"]:
                case "system" if self.system and self.is_joined:
                    system = f"{self.system[0]}{message['content']}{self.system[1]}"
                case "system" if self.system:
                    text += f"{self.system[0]}{message['content']}{self.system[1]}"
                case "user":
                    text += f"{self.user[0]}{system}{message['content']}{self.user[1]}"
                    system = ""
                case _:
                    text += f"{self.answer[0]}{message['content']}{self.answer[1]}"
        return text + self.prompt

    def go_template(self) -> str:
        """Return the chat template in Go's template language."""
        before, after = self.system or ("", "")
        texts = {
            "head": self.head, "user": self.user[0], "user_end": self.user[1], "answer": self.answer[0],
            "answer_end": self.answer[1], "prompt": self.prompt, "system": before, "system_end": after,
        }  # fmt: skip
        quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
        branch = _SYSTEM_BRANCH % quoted if self.system and not self.is_joined else ""
        joined = _JOINED % quoted if self.is_joined else ""
        return _TEMPLATE % {**quoted, "system_branch": branch, "joined": joined}


def modelfile(chat_format: ChatFormat, end_tokens: Sequence[int], *, adds_bos: bool) -> str:
    """Return the content of a Modelfile. The Modelfile must be in the same folder as `model.gguf`.

    adds_bos: True if the server adds BOS before each prompt; the template then omits BOS.
    Raises ModelError if the chat template cannot be written as a Go template.
    """
    bos = (chat_format.tokenizer.bos_token or "") if adds_bos else ""
    template = derive(chat_format, bos).go_template()
    stops = "".join(f"PARAMETER stop {json.dumps(chat_format.tokenizer.decode([token]))}\n" for token in end_tokens)
    return f'FROM ./model.gguf\nTEMPLATE """{template}"""\n{stops}'


def derive(chat_format: ChatFormat, bos: str = "") -> Turns:
    """Derive the constant texts of a chat template.

    bos: text that is removed from the beginning of rendered chats.
    Raises ModelError if prompts that are built from these texts differ from the prompts of the chat template.
    """
    for with_system in (True, False):
        try:
            turns = _derived(chat_format, bos, with_system=with_system)
        except Exception:  # noqa: BLE001, S112 - templates raise all kinds of exceptions for unsupported roles
            continue
        if all(turns.render(chat) == _rendered(chat_format, chat, bos) for chat in _chats(with_system=with_system)):
            return turns
    raise ModelError(
        code="export_unsupported",
        message="The model's chat template cannot be converted to a template for Ollama.",
        hint="Use `--format gguf`, and serve the model with llama.cpp, which uses the model's own template.",
        param="format",
    )


def _derived(chat_format: ChatFormat, bos: str, *, with_system: bool) -> Turns:
    user, answer, following = (
        {"role": role, "content": text} for role, text in (("user", _USER), ("assistant", _ANSWER), ("user", _NEXT))
    )
    asked = _rendered(chat_format, [user], bos, prompt=False)
    prompt = _rendered(chat_format, [user], bos)[len(asked) :]
    user_end = asked.partition(_USER)[2]
    answered = _rendered(chat_format, [user, answer], bos, prompt=False)
    answer_end = answered.partition(_ANSWER)[2]
    whole = _rendered(chat_format, [user, answer, following], bos, prompt=False)
    between = whole.partition(_ANSWER)[2].partition(_NEXT)[0]
    user_begin = between.removeprefix(answer_end)
    head = whole.partition(_USER)[0].removesuffix(user_begin)
    answer_begin = whole.partition(_USER)[2].partition(_ANSWER)[0].removeprefix(user_end)
    system, is_joined = None, False
    if with_system:
        text = _rendered(chat_format, [{"role": "system", "content": _SYSTEM}, user], bos, prompt=False)
        before, _, rest = text.partition(_SYSTEM)
        after = rest.partition(_USER)[0]
        is_joined = not after.endswith(user_begin)
        system = ("", after) if is_joined else (before, after.removesuffix(user_begin))
    return Turns(head, system, is_joined, (user_begin, user_end), (answer_begin, answer_end), prompt)


def _chats(*, with_system: bool) -> list[list[Message]]:
    one: list[Message] = [{"role": "user", "content": "How are you?"}]
    answer: list[Message] = [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": "{{ 1 }} – and 2?"}]
    system: list[Message] = [{"role": "system", "content": "Answer briefly."}]
    two = [*one, *answer]
    return [one, two, [*system, *one], [*system, *two]] if with_system else [one, two]


def _rendered(chat_format: ChatFormat, messages: Sequence[Message], bos: str, *, prompt: bool = True) -> str:
    return chat_format.render(messages, prompt=prompt).removeprefix(bos)
