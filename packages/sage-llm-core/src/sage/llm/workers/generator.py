"""Text generation: one answer at a time, streamed in pieces, cancelled when the client disconnects."""

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria

from sage.common.errors import ConfigError, ModelError
from sage.libs.finetune.data.messages import read_conversation
from sage.libs.finetune.data.values import RecordError
from sage.libs.models.adapters import attach_adapter, merged
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.loading import load_causal_lm, load_tokenizer, tokenizer_folder
from sage.libs.models.resolve import ModelKind
from sage.llm.workers.penalties import processors
from sage.llm.workers.sampling import Piece, Sampling, TokenScore
from sage.llm.workers.scoring import LastLogits, Scorer, prompt_scores
from sage.llm.workers.server import load_source
from sage.llm.workers.text import StopStrings, TextDecoder, TokenBytes
from sage.llm.workers.time_limit import TimeLimitExceeded, within

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: Time limit for a chat template, which is a program and may never end.
RENDER_SECONDS = 10.0
#: A temperature below this is greedy decoding; logits divided by it would overflow.
_GREEDY_BELOW = 1e-5


class Generator:
    """A loaded model with its tokenizer."""

    def __init__(self, name: str, dtype: str) -> None:
        """Load a base, or a base with an adapter merged into it. Raises ModelError."""
        source, base_folder = load_source(name)
        numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}
        default = "bf16" if torch.cuda.is_available() else "fp32"
        model = load_causal_lm(base_folder, numbers[default if dtype == "auto" else dtype])
        if source.kind is ModelKind.ADAPTER:
            model = merged(attach_adapter(model, source.folder))
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.tokenizer: Any = load_tokenizer(tokenizer_folder(source, base_folder))
        if warning := ensure_chat_template(self.tokenizer):
            logger.warning("%s", warning)
        self.context_tokens = int(getattr(model.config, "max_position_embeddings", 4096))
        self.chat_format = ChatFormat(self.tokenizer)
        self._end_tokens = rendered(lambda: self.chat_format.end_ids(self.model.generation_config.eos_token_id))
        self._token_bytes = TokenBytes(self.tokenizer)
        self._characters_per_token = max(32, *map(len, self.tokenizer.get_vocab()))
        self._gone = threading.Event()
        for layer in _layers(self.model):
            layer.register_forward_pre_hook(lambda *_: self._look())

    def chat_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the prompt of a chat as token ids. Raises ConfigError if the model's template rejects it."""
        try:
            asked = read_conversation(messages, "messages")
        except RecordError as error:
            raise _invalid(error.message, "messages", error.hint) from error
        if asked.ignored:
            raise _invalid(f"{asked.ignored[0]} is not supported.", "messages", "Remove it.")
        try:
            return self.chat_format.prompt_ids(asked.messages, tools or None)
        except Exception as error:  # jinja and templates raise what they like
            raise _invalid(f"messages: the model's chat template rejects them: {error}", "messages") from error

    def text_prompt(self, text: str) -> list[int]:
        """Return the prompt of a plain completion."""
        return self.chat_format.text_ids(text)

    def check_characters(self, characters: int, param: str) -> None:
        """Raise ConfigError if a prompt is too long for the context with any tokenization, before spending time on it."""
        limit = self.context_tokens * self._characters_per_token
        if characters > limit:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {characters} characters, more than the {limit} that can fit into the model's "
                f"context of {self.context_tokens} tokens.",
                hint="Shorten it.",
                param=param,
            )

    def check_prompt(self, prompt: list[int], sampling: Sampling, param: str) -> None:
        """Raise ConfigError if the prompt is empty, too long, or has tokens that the model does not have."""
        known = self.model.get_input_embeddings().num_embeddings
        if not prompt:
            raise _invalid(f"{param} is empty; the model needs at least one token.", param)
        if max(prompt) >= known:
            raise _invalid(f"{param}: token {max(prompt)} does not exist, the model has {known}.", param)
        if (token := max(sampling.logit_bias, default=0)) >= known:
            raise _invalid(f"logit_bias: token {token} does not exist, the model has {known}.", "logit_bias")
        if len(prompt) + min(1, sampling.max_tokens) > self.context_tokens:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {len(prompt)} tokens; the model's context has {self.context_tokens}.",
                hint="Shorten it.",
                param=param,
            )

    def generate(
        self, prompt: list[int], sampling: Sampling, *, continues: bool, put: Callable[[Piece], None], gone: threading.Event
    ) -> None:
        """Generate one answer and `put` its pieces, until it ends or `gone` is set.

        The caller must check the prompt and must not run two calls at once. continues: the answer continues the text of
        the prompt, as in completions.
        """
        self._gone = gone
        try:
            with torch.inference_mode():
                decoder = TextDecoder(self.tokenizer, prompt if continues else [])
                if sampling.echo:
                    decoder.characters = self._echo(prompt, sampling, put)
                if sampling.max_tokens:
                    self._answer(prompt, sampling, decoder, put)
                else:
                    put(Piece("", finish_reason="length"))
        except _Abandoned:
            return

    def _echo(self, prompt: list[int], sampling: Sampling, put: Callable[[Piece], None]) -> int:
        """Put the prompt as the first piece of the answer; return its length in characters."""
        decoder, scores, text = TextDecoder(self.tokenizer), list[TokenScore](), ""
        if sampling.top_logprobs is None:
            text = "".join(map(decoder.push, prompt))
        else:
            scorer = Scorer(self._token_bytes, sampling.top_logprobs)
            for piece, score in prompt_scores(self.model, prompt, scorer, decoder, self._look):
                text += piece
                scores.append(score)
        text += decoder.flush()
        put(Piece(text, tuple(scores)))
        return len(text)

    def _answer(self, prompt: list[int], sampling: Sampling, decoder: TextDecoder, put: Callable[[Piece], None]) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        limit = min(sampling.max_tokens, self.context_tokens - len(prompt))
        if sampling.seed is None:
            torch.seed()  # otherwise the seed of an earlier request would still have an effect
        else:
            torch.manual_seed(sampling.seed)
        scorer = Scorer(self._token_bytes, sampling.top_logprobs or 0)
        with LastLogits(self.model) as last:
            listener = _Listener(decoder, sampling, self._end_tokens, put)
            if sampling.top_logprobs is not None:
                listener.score = lambda token, offset: scorer.score(token, last.logits, offset)
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                stopping_criteria=[listener],
                logits_processor=processors(sampling, len(prompt)),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self._end_tokens or None,
                num_beams=1,
                num_return_sequences=1,
                **self._choice(sampling),
            )
        listener.end()

    def _choice(self, sampling: Sampling) -> dict[str, Any]:
        """Return transformers' sampling options, from the request, else from the model's configuration."""
        configured = self.model.generation_config

        def value(name: str, default: float) -> Any:
            values = (getattr(sampling, name), getattr(configured, name, None), default)
            return next(value for value in values if value is not None)

        chosen: dict[str, Any] = {"repetition_penalty": value("repetition_penalty", 1.0)}
        if (temperature := value("temperature", 1.0)) < _GREEDY_BELOW:
            return {**chosen, "do_sample": False}
        chosen |= {"do_sample": True, "temperature": temperature, "top_p": value("top_p", 1.0)}
        return {**chosen, "top_k": max(0, value("top_k", 0)), "min_p": value("min_p", 0.0) or None}

    def _look(self) -> None:
        """Raise _Abandoned if the request was cancelled; called before every layer, because long prompts take long."""
        if self._gone.is_set():
            raise _Abandoned


class _Abandoned(Exception):
    """The request was cancelled."""


class _Listener(StoppingCriteria):
    """Converts generated tokens to pieces, and ends the generation at an end token or a stop string."""

    def __init__(
        self, decoder: TextDecoder, sampling: Sampling, end_tokens: list[int], put: Callable[[Piece], None]
    ) -> None:
        self._decoder, self._put, self._end_tokens = decoder, put, end_tokens
        self._stops = StopStrings(sampling.stop)
        self._pending: list[TokenScore] = []  #: scores of text that is held back
        self._tokens, self._characters = 0, decoder.characters
        self._has_ended = False
        #: Scores a token at an offset of the text; None: no scores are wanted.
        self.score: Callable[[int, int], TokenScore] | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return (1,) bool: whether to end."""
        token = int(input_ids[0, -1])
        self._tokens += 1
        self._has_ended = token in self._end_tokens
        if not self._has_ended:
            if self.score:
                self._pending.append(self.score(token, self._decoder.characters))
            self._give(self._stops.push(self._decoder.push(token)))
            self._has_ended = self._stops.is_met
        return torch.full((input_ids.shape[0],), self._has_ended, dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Put the last piece, with the finish reason."""
        rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
        reason = "stop" if self._has_ended or self._stops.is_met else "length"
        self._characters += len(rest)
        is_cut = self._stops.is_met
        scores = tuple(score for score in self._pending if not is_cut or score.text_offset < self._characters)
        self._put(Piece(rest, scores, finish_reason=reason, completion_tokens=self._tokens))

    def _give(self, text: str) -> None:
        if text:
            self._characters += len(text)
            ready = [score for score in self._pending if score.text_offset < self._characters]
            self._pending = self._pending[len(ready) :]
            self._put(Piece(text, tuple(ready)))


def rendered(render: Callable[[], T]) -> T:
    """Call `render` and return its result. Raises ModelError if it takes longer than RENDER_SECONDS."""
    try:
        return within(RENDER_SECONDS, render)
    except TimeLimitExceeded as error:
        message = f"The model's chat template did not finish within {RENDER_SECONDS:g} s."
        raise ModelError(code="template_too_slow", message=message) from error


def _layers(model: Any) -> list[torch.nn.Module]:
    """Return the transformer layers: the ModuleList with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters()), default=[]))


def _invalid(message: str, param: str, hint: str = "") -> ConfigError:
    return ConfigError(code="invalid_value", message=message, hint=hint, param=param)
