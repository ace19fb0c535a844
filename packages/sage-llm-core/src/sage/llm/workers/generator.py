"""Generation: one model, one answer at a time, piece by piece, stopped when nobody listens any more."""

import logging
import threading
from collections.abc import Generator as Pieces
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from sage.common.errors import ConfigError, EngineError
from sage.libs.finetune.data.formats import RecordError, message_of
from sage.libs.models.adapters import attach_adapter, merged
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.loading import load_causal_lm, load_tokenizer
from sage.libs.models.resolve import ModelKind
from sage.llm.workers.server import load_source
from sage.llm.workers.stop_strings import until_stop

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None: as the model's generation_config.json says."""

    max_tokens: int
    temperature: float | None = None  #: 0: always the likeliest
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Answer:
    """Filled while an answer is generated."""

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str = "stop"


class _Listener(StoppingCriteria):
    """Ends generation when nobody listens; counts the tokens on the way."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.is_gone, self.last_token = answer, threading.Event(), -1

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return (1,) bool: whether to end."""
        self.answer.completion_tokens = input_ids.shape[1] - self.answer.prompt_tokens
        self.last_token = int(input_ids[0, -1])
        return torch.full((input_ids.shape[0],), self.is_gone.is_set(), dtype=torch.bool, device=input_ids.device)


class Generator:
    """A loaded model with its tokenizer."""

    def __init__(self, name: str, dtype: str) -> None:
        """Load a base, or a base with an adapter merged into it. Raises ModelError."""
        source, base_folder = load_source(name)
        numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}
        default = "bf16" if torch.cuda.is_available() else "fp32"
        model = load_causal_lm(base_folder, numbers[default if dtype == "auto" else dtype])
        has_own_tokenizer = (source.folder / "tokenizer.json").is_file()
        if source.kind is ModelKind.ADAPTER:
            model = merged(attach_adapter(model, source.folder))
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        use_adapters = source.kind is ModelKind.ADAPTER and has_own_tokenizer
        self.tokenizer: Any = load_tokenizer(source.folder if use_adapters else base_folder)
        if warning := ensure_chat_template(self.tokenizer):
            logger.warning("%s", warning)
        self.context_tokens = int(getattr(model.config, "max_position_embeddings", 4096))
        self.chat_format = ChatFormat(self.tokenizer)
        self._end_tokens = self.chat_format.end_ids(self.model.generation_config.eos_token_id)

    def chat_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Return the prompt of a chat. Raises ConfigError where the model's template refuses it."""
        try:
            asked = [message_of(message, f"messages[{at}]") for at, message in enumerate(messages)]
        except RecordError as error:
            raise ConfigError(code="invalid_value", message=error.message, hint=error.hint, param="messages") from error
        try:
            return self.chat_format.prompt_ids(asked, tools or None)
        except Exception as error:  # jinja and templates raise what they like
            message = f"messages: the model's chat template refuses them: {error}"
            raise ConfigError(code="invalid_value", message=message, param="messages") from error

    def text_prompt(self, text: str) -> list[int]:
        """Return the prompt of a plain completion."""
        return self.chat_format.text_ids(text)

    def generate(self, prompt: list[int], sampling: Sampling, answer: Answer) -> Pieces[str]:
        """Yield an answer piece by piece; closing the iterator ends the generation.

        One at a time: the caller sees to that. Raises ConfigError where the prompt leaves no room, EngineError where
        generation fails.
        """
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise ConfigError(
                code="context_length_exceeded",
                message=f"The prompt has {len(prompt)} tokens, the model's context {self.context_tokens}.",
                hint="Shorten it.",
                param="messages",
            )
        limit = min(sampling.max_tokens, room)
        listener, failures = _Listener(answer), SimpleQueue[Exception]()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = threading.Thread(
            target=self._run, args=(prompt, sampling, limit, streamer, listener, failures), daemon=True
        )
        thread.start()
        try:
            met_stop = yield from until_stop(streamer, sampling.stop)
        finally:
            listener.is_gone.set()
            thread.join()
        if not failures.empty():
            raise EngineError(code="generation_failed", message=f"Generation failed: {failures.get()}.")
        has_ended = met_stop or listener.last_token in self._end_tokens
        answer.finish_reason = "stop" if has_ended else "length"

    def _run(
        self,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        streamer: TextIteratorStreamer,
        listener: _Listener,
        failures: SimpleQueue[Exception],
    ) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        options: dict[str, Any] = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature == 0:
            options = {"do_sample": False}
        elif sampling.temperature is None and self.model.generation_config.temperature in (None, 1.0):
            options["temperature"] = 1.0
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    streamer=streamer,
                    stopping_criteria=[listener],
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self._end_tokens or None,
                    **{key: value for key, value in options.items() if value is not None},
                )
        except Exception as error:
            logger.exception("generation failed")
            failures.put(error)
            streamer.end()
