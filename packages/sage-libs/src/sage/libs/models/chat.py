"""Convert chats to tokens. Training, evaluation, sample answers and serving use `ChatFormat`, so all use the same tokens."""

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
#: Placeholder for the text of a message, to find where a template writes the text. No template contains the placeholder.
_PROBE = "Zq7Zq7"
_CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- 'You can call these functions:\n' }}{%- for tool in tools %}{{- (tool | tojson) + '\n' }}{%- endfor %}"
    '{{- \'To call one, write <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.END\n\' }}{%- endif %}'
    "{%- for message in messages %}{%- if not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' }}"
    "{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{{- '</tool_call>' }}{%- endfor %}"
    "{{- 'END\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def ensure_chat_template(tokenizer: Any) -> str | None:
    """If a tokenizer has no chat template, set ChatML and return a warning for the user; otherwise return None."""
    if tokenizer.chat_template:
        return None
    known = tokenizer.get_vocab()
    end = "<|im_end|>" if "<|im_end|>" in known or not tokenizer.eos_token else tokenizer.eos_token
    bos = "{{- bos_token }}" if tokenizer.bos_token and ChatFormat(tokenizer).prefix == [tokenizer.bos_token_id] else ""
    tokenizer.chat_template = bos + _CHATML.replace("END", end)
    return (
        f"The model has no chat template, so ChatML is used, with {end!r} at the end of each turn. "
        "This template is saved with the result."
    )


class ChatFormat:
    """The chat template and the tokenizer of a model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids |= {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None}
        plain = self.ids([_PROBE])[0]
        around = list(tokenizer(_PROBE)["input_ids"])
        #: Token ids that the tokenizer adds before a text: [BOS] or [].
        self.prefix: list[int] = around[: next((at for at in range(len(around)) if around[at:][: len(plain)] == plain), 0)]
        #: Whether the parts of a text can be tokenized separately. False if the tokenizer adds a space before every text,
        #: because each part would then begin with an additional space.
        self.is_concatenative = self.ids(["a b"])[0] == [token for part in self.ids(["a", " b"]) for token in part]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without added special tokens."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """Render a chat to text, with the generation prompt if `prompt` is True. The template may raise any exception."""
        text = self.tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False)
        return str(text)

    def render_marked(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[tuple[int, int]]] | None:
        """Return the text of a chat, and the character ranges that the template marks as answers (`{% generation %}`).

        Returns None if the template marks no answers.
        """
        template = str(self.tokenizer.get_chat_template(tools=tools))
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(int(begin), int(end)) for begin, end in spans[0]]

    def prompt_ids(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Return the token ids of a chat with the generation prompt."""
        return self.ids([self.render(messages, tools, prompt=True)])[0]

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a plain text. No EOS is added. If the tokenizer adds BOS, the ids begin with one BOS."""
        return [*self.prefix_of(text), *self.ids([text])[0]]

    def prefix_of(self, text: str) -> list[int]:
        """Return the token ids to add before a plain text; [] if the text already begins with BOS."""
        begins = self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        return [] if begins else self.prefix

    def split_ids(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the token ids of each part of each text. Parts are tokenized so that no token spans two parts."""
        if self.is_concatenative:
            tokens = iter(self.ids([part for parts in texts for part in parts]))
            return [[next(tokens) for _ in parts] for parts in texts]
        return [self._split_ids(parts) for parts in texts]

    def _split_ids(self, parts: Sequence[str]) -> list[list[int]]:
        split: list[list[int]] = []
        wholes = self.ids(["".join(parts[: count + 1]) for count in range(len(parts))])
        for at, whole in enumerate(wholes):
            before = wholes[at - 1] if at else []
            if whole[: len(before)] == before:
                split.append(whole[len(before) :])
            else:  # add a line break before the part, because the tokenizer adds no space after a line break
                line_end, part = self.ids(["\n", f"\n{parts[at]}"])
                split.append(part[len(line_end) :])
        return split

    def opening(self, text: str) -> str:
        """Return the part of `text` before the content of the first message.

        text: a rendered chat whose first message is an answer of the assistant.
        """
        asked = [{"role": "user", "content": _PROBE}]
        header = self.render(asked, prompt=True).rpartition(_PROBE)[2]
        header = header.removeprefix(self.render(asked).rpartition(_PROBE)[2])
        return text[: text.index(header) + len(header)] if header and header in text else self.header([], None, text)

    def header(self, messages: Sequence[Message], tools: Any, text: str) -> str:
        """Return the part of `text` before the answer.  text: a rendered chat that consists of `messages` and an answer."""
        probe = self.render([*messages, {"role": "assistant", "content": _PROBE}], tools)
        at = next((i for i, (a, b) in enumerate(zip(probe, text, strict=False)) if a != b), min(len(probe), len(text)))
        return text[:at]

    @functools.cache  # noqa: B019 - the object and its tokenizer have the same lifetime
    def answer_end(self, *, calls: bool = False) -> int | None:
        """Return the id of the special token that the template writes after an answer.

        calls: whether the answer has tool calls.
        If the template writes no special token after an answer, return the first special token of the next message. If the
        next message has no special token either, return EOS.
        """
        asked = {"role": "user", "content": "Hi"}
        if calls:
            function = {"name": "call", "arguments": {"x": _PROBE}}
            called = [{"id": "call00000", "type": "function", "function": function}]
            answered: Message = {"role": "assistant", "content": "", "tool_calls": called}
            then: Message = {"role": "tool", "content": "Hi", "name": "call", "tool_call_id": "call00000"}
        else:
            answered, then = {"role": "assistant", "content": _PROBE}, asked
        for messages in ([asked, answered], [asked, answered, then]):
            rest = ""
            with contextlib.suppress(Exception):  # templates can raise exceptions of any type
                rest = self.render(messages).rpartition(_PROBE)[2]
            found = next((token for token in self.ids([rest])[0] if token in self.special_ids), None)
            if found is not None:
                return found
        end: int | None = self.tokenizer.eos_token_id
        return end

    def end_ids(self, configured: int | Sequence[int] | None) -> list[int]:
        """Return the ids of all tokens that end generation. The ids come from `configured`, the tokenizer and the template.

        configured: `eos_token_id` of the model's generation_config.json.
        """
        listed = [configured] if isinstance(configured, int) else configured or []
        ends = {*listed, self.tokenizer.eos_token_id, self.answer_end(), self.answer_end(calls=True)}
        return sorted(end for end in ends if end is not None)
