"""Convert requests to prompts with the tokenizer and the chat template of a served model."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sage.common.errors import ConfigError, ModelError
from sage.libs.finetune.data.messages import read_conversation
from sage.libs.finetune.data.values import RecordError
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.loading import load_tokenizer
from sage.llm.workers.answer_format import AnswerFormat
from sage.llm.workers.sampling import Sampling
from sage.llm.workers.structured import Grammars
from sage.llm.workers.text import TokenBytes
from sage.llm.workers.time_limit import TimeLimitExceeded, within

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: The reasoning marker is searched for in this number of tokens at the end of a prompt.
_MARKER_TOKENS = 16
#: Time limit for a chat template, in seconds. A template is a program, so it can run forever.
RENDER_SECONDS = 10.0


class Voice:
    """The tokenizer and chat template of a base model or of an adapter."""

    def __init__(self, folder: Path, generation_config: Any, context_tokens: int, embeddings: int) -> None:
        """folder: contains the tokenizer.  embeddings: number of token embeddings in the model.

        Raises ModelError if the tokenizer cannot be loaded, or if the chat template takes longer than RENDER_SECONDS.
        """
        self.tokenizer: Any = load_tokenizer(folder)
        if warning := ensure_chat_template(self.tokenizer):
            logger.warning("%s", warning)
        self.chat_format = ChatFormat(self.tokenizer)
        self.context_tokens = context_tokens
        self._embeddings = embeddings
        self.end_tokens = frozenset(rendered(lambda: self.chat_format.end_ids(generation_config.eos_token_id)))
        self.token_bytes = TokenBytes(self.tokenizer)
        self.answer_format = rendered(lambda: AnswerFormat.of(self.chat_format))
        self.shown_tokens = self.answer_format.special_tokens(self.tokenizer)
        self.special_tokens = {
            self.tokenizer.convert_ids_to_tokens(token): token for token in self.tokenizer.all_special_ids
        }
        self.grammars = Grammars(self.tokenizer, embeddings, sorted(self.end_tokens))
        self._characters_per_token = max(32, *map(len, self.tokenizer.get_vocab()))

    def chat_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the prompt of a chat as token ids. Raises ConfigError if the messages are invalid or the template fails."""
        try:
            asked = read_conversation(messages, "messages")
        except RecordError as error:
            raise _invalid(error.message, "messages", error.hint) from error
        if asked.ignored:
            raise _invalid(f"{asked.ignored[0]} is not supported.", "messages", "Remove this field.")
        try:
            return self.chat_format.prompt_ids(asked.messages, tools or None)
        except Exception as error:  # jinja and templates raise all kinds of exceptions
            raise _invalid(f"The model's chat template rejects the messages: {error}", "messages") from error

    def ends_in_reasoning(self, prompt: list[int]) -> bool:
        """Return whether a prompt ends with the marker that opens the reasoning. Some templates add this marker."""
        marker = self.answer_format.think_open
        return bool(marker) and self.tokenizer.decode(prompt[-_MARKER_TOKENS:]).rstrip().endswith(marker)

    def text_prompt(self, text: str) -> list[int]:
        """Return the prompt of a plain completion as token ids."""
        return self.chat_format.text_ids(text)

    def check_characters(self, characters: int, param: str) -> None:
        """Raise ConfigError if a prompt with this number of characters cannot fit into the context."""
        limit = self.context_tokens * self._characters_per_token
        if characters > limit:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {characters} characters, but at most {limit} can fit into the model's "
                f"context of {self.context_tokens} tokens.",
                hint="Shorten the prompt.",
                param=param,
            )

    def check_prompt(self, prompt: list[int], sampling: Sampling, param: str) -> None:
        """Raise ConfigError if the prompt is empty or too long, or if the prompt or `logit_bias` has an unknown token."""
        known = self._embeddings
        if not prompt:
            raise _invalid(f"{param} is empty; the model needs at least one token.", param)
        if max(prompt) >= known:
            raise _invalid(f"{param}: token id {max(prompt)} does not exist; the model has {known} tokens.", param)
        if (token := max(sampling.logit_bias, default=0)) >= known:
            raise _invalid(f"logit_bias: token id {token} does not exist; the model has {known} tokens.", "logit_bias")
        if len(prompt) + min(1, sampling.max_tokens) > self.context_tokens:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {len(prompt)} tokens; the model's context has {self.context_tokens}.",
                hint="Shorten the prompt.",
                param=param,
            )


def rendered(render: Callable[[], T]) -> T:
    """Call `render` and return its result. Raises ModelError if `render` takes longer than RENDER_SECONDS."""
    try:
        return within(RENDER_SECONDS, render)
    except TimeLimitExceeded as error:
        message = f"The model's chat template did not finish within {RENDER_SECONDS:g} s."
        raise ModelError(code="template_too_slow", message=message) from error


def _invalid(message: str, param: str, hint: str = "") -> ConfigError:
    return ConfigError(code="invalid_value", message=message, hint=hint, param=param)
