"""Load the base model, and create the answers that the model generates."""

from collections.abc import Callable
from typing import Any

import torch

from sage.libs.models.adapters import attach_adapter, merged
from sage.libs.models.loading import load_causal_lm, tokenizer_folder
from sage.libs.models.resolve import ModelKind
from sage.llm.workers.answers import Answer
from sage.llm.workers.choosing import Chooser
from sage.llm.workers.runners import Runner, runner_for
from sage.llm.workers.sampling import Piece, Sampling
from sage.llm.workers.sequential import SequentialRunner
from sage.llm.workers.server import load_source
from sage.llm.workers.voice import Voice

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Generator:
    """A base model, possibly with an adapter merged into it."""

    def __init__(self, name: str, dtype: str, context_tokens: int | None = None) -> None:
        """Load the model.  context_tokens: maximum context length. None: the model's own limit.

        Raises ModelError if the model cannot be loaded.
        """
        source, base_folder = load_source(name)
        default = "bf16" if torch.cuda.is_available() else "fp32"
        model = load_causal_lm(base_folder, _DTYPES[default if dtype == "auto" else dtype])
        if source.kind is ModelKind.ADAPTER:
            model = merged(attach_adapter(model, source.folder))
        self.model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.generation_config: Any = model.generation_config
        self.embeddings = int(self.model.get_input_embeddings().num_embeddings)
        own_context = int(getattr(model.config, "max_position_embeddings", 4096))
        self.context_tokens = min(own_context, context_tokens or own_context)
        self.folder = source.folder if source.kind is ModelKind.ADAPTER else base_folder
        self.voice = self.voice_of(tokenizer_folder(source, base_folder))
        self.runner: Runner = runner_for(self.model)

    @property
    def is_batching(self) -> bool:
        """Whether several answers can be in progress at the same time."""
        return not isinstance(self.runner, SequentialRunner)

    def voice_of(self, folder: Any) -> Voice:
        """Return a Voice for this model: the tokenizer, chat template and end tokens in `folder`. Raises ModelError."""
        return Voice(folder, self.generation_config, self.context_tokens, self.embeddings)

    def answer(
        self, voice: Voice, prompt: list[int], sampling: Sampling, put: Callable[[Piece], None], *, continues: bool
    ) -> Answer:
        """Return an answer that is ready to run. The caller must have checked the prompt."""
        chooser = Chooser(sampling, self.generation_config, prompt)
        limit = min(sampling.max_tokens, self.context_tokens - len(prompt))
        return Answer(voice, prompt, sampling, chooser, limit, put, continues=continues)
