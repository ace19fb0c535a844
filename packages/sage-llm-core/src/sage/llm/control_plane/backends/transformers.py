"""The backend for SAGE's own llm server, which uses transformers on a CPU or GPU."""

import sys
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from sage.libs.models.hot import why_not_hot
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import BatchOptions, Capabilities, WorkerBackend
from sage.llm.control_plane.backends.memory import MemoryEstimate, cache_tokens, estimate_server, sizes_of, token_bytes
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT

#: Memory of a server without the model: Python, torch and transformers. Measured on Linux.
_FRAMEWORK_BYTES = 500_000_000


class TransformersOptions(BatchOptions):
    """The options of an engine with the backend `transformers`."""

    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of the weights; auto: fp32 on a CPU, bf16 on a GPU."
    )


class TransformersBackend(WorkerBackend):
    """Serves a base model with adapters that are loaded while the server runs, or a base model merged with one adapter."""

    name: ClassVar[str] = "transformers"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind), hot_adapters=True)
    options: ClassVar[type[BaseModel]] = TransformersOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def argv(self, model: str, served_name: str, options: TransformersOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the socket that the launcher passes."""
        limits = {"--context-tokens": options.context_tokens, "--cache-tokens": options.kv_cache_tokens}
        given = [text for name, value in limits.items() if value for text in (name, str(value))]
        return (
            *self.interpreter, "-m", "sage.llm.workers", "generation", "--model", model, "--served-name", served_name,
            "--port", PORT_ARGUMENT, "--fd", DESCRIPTOR_ARGUMENT, "--dtype", options.dtype, "--slots", str(options.slots),
            "--max-tokens", str(options.max_tokens), *given,
        )  # fmt: skip

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return why a running server of `base` cannot load the adapter, or None if the server can load it."""
        return why_not_hot(adapter, base)

    def estimate(self, model: ModelSource, options: TransformersOptions) -> MemoryEstimate | None:
        """Return the estimated memory of the server, or None if the sizes of the model are not known."""
        sizes = sizes_of(model.base or model)
        if sizes is None:
            return None
        is_bf16 = options.dtype == "bf16" or (options.dtype == "auto" and environments.device() == "cuda")
        value_bytes = 2 if is_bf16 else 4
        context = min(sizes.max_position_embeddings, options.context_tokens or sizes.max_position_embeddings)
        tokens = options.kv_cache_tokens or cache_tokens(
            context, options.slots, is_limited=options.context_tokens is not None
        )
        of_token = token_bytes(sizes, value_bytes)
        return estimate_server(
            model, framework_bytes=_FRAMEWORK_BYTES, weight_bytes=value_bytes,
            cache_bytes=tokens * of_token, least_cache_bytes=context * of_token,
        )  # fmt: skip
