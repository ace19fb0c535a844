"""The backend for SAGE's own server, which uses transformers and supports every model and every processor."""

import sys
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from sage.libs.models.hot import why_not_hot
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, WorkerBackend, parameter_count
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT


class TransformersOptions(ServingOptions):
    """The options of an llm engine."""

    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of the weights; auto: fp32 on a CPU, bf16 on a GPU."
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Maximum tokens of prompt and answer; default: the model's limit."
    )
    slots: int = Field(16, ge=1, le=1024, description="Maximum number of answers that are generated at the same time.")
    kv_cache_tokens: int | None = Field(
        None,
        ge=16,
        description="Maximum tokens of all prompts and answers in progress, further answers wait; default: no limit.",
    )
    max_tokens: int = Field(1024, ge=1, description="Maximum length of an answer in tokens, if the request sets no limit.")


class TransformersBackend(WorkerBackend):
    """Serves a base model with adapters that are loaded while the server runs, or with one adapter merged into it."""

    name: ClassVar[str] = "transformers"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind), hot_adapters=True)
    options: ClassVar[type[BaseModel]] = TransformersOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def argv(self, model: str, served_name: str, options: TransformersOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the socket that the launcher passes."""
        limits = {"--context-tokens": options.context_tokens, "--cache-tokens": options.kv_cache_tokens}
        given = [text for name, value in limits.items() if value for text in (name, str(value))]
        return (
            *self.interpreter, "-m", "sage.llm.workers.generation", "--model", model, "--served-name", served_name,
            "--port", PORT_ARGUMENT, "--fd", DESCRIPTOR_ARGUMENT, "--dtype", options.dtype, "--slots", str(options.slots),
            "--max-tokens", str(options.max_tokens), *given,
        )  # fmt: skip

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return why a running server cannot load the adapter; None if the adapter is plain LoRA, which it can load."""
        return why_not_hot(adapter, base)

    def memory_bytes(self, model: ModelSource, options: TransformersOptions) -> int | None:
        """Return the size of the weights in memory."""
        parameters = parameter_count(model)
        return parameters and parameters * (2 if options.dtype == "bf16" else 4)
