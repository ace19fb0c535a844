"""The backend for llama.cpp's server, which runs GGUF files on a CPU in a separate environment."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from sage.common.cgroups import available_cores
from sage.libs.models.export.formats import PRECISIONS
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, TokenMetrics, WorkerBackend, parsed
from sage.llm.control_plane.backends.memory import MemoryEstimate, ServingEstimate, sizes_of, token_bytes
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT
from sage.llm.control_plane.store.records import ServerRecord

#: Defaults in tokens: maximum context length, and cache size of each slot. The server process uses the same defaults.
CONTEXT_TOKENS, SLOT_TOKENS = 8192, 512
#: Number of tokens whose logits are in memory at the same time. This number is the default of llama.cpp.
_BATCH_TOKENS = 512
#: Memory of a server without model, cache and logits. Measured on Linux.
_FRAMEWORK_BYTES = 60_000_000
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
#: GGUF type for each value of `quantize`. The converter cannot write the more exact 4-bit types, such as q4_k_m.
_QUANTIZED = {"int8": "q8_0", "int4": "q4_1"}
#: Request fields that llama.cpp's server reads, and OpenAI's request fields that do not change an answer.
_PARAMETERS = frozenset({
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "top_p", "top_k",
    "min_p", "typical_p", "top_n_sigma", "frequency_penalty", "presence_penalty", "repeat_penalty", "repeat_last_n",
    "logit_bias", "seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "tools",
    "tool_choice", "parallel_tool_calls", "response_format", "grammar", "json_schema", "chat_template_kwargs",
    "reasoning_format", "samplers", "ignore_eos", "cache_prompt", "user", "metadata", "store", "service_tier",
    "safety_identifier", "prompt_cache_key",
})  # fmt: skip


class LlamaCppOptions(ServingOptions):
    """The options of an engine that llama.cpp serves."""

    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of the weights; auto: the type of the GGUF file, or fp32 for models in other formats."
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Maximum number of tokens of a prompt plus its answer; default: the model's limit, "
        "but at most 8192.",
    )  # fmt: skip
    slots: int = Field(16, ge=1, le=256, description="Maximum number of answers that are generated at the same time.")
    kv_cache_tokens: int | None = Field(
        None, ge=16, description="Size of the key/value cache that all slots share, in tokens; default: 512 for each slot, "
        "but at least `context_tokens`.",
    )  # fmt: skip
    max_tokens: int = Field(1024, ge=1, description="Maximum length of an answer in tokens, if the request sets no limit.")

    @property
    def precision(self) -> str | None:
        """The precision of the GGUF file to create. None: the precision of the given GGUF file, or f32 for other models."""
        return _QUANTIZED.get(self.quantize) or _PRECISIONS.get(self.dtype)


class LlamaCppBackend(WorkerBackend):
    """Serves one model, or a base model with an adapter merged into it."""

    name: ClassVar[str] = "llamacpp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({EngineKind.LLM}), frozenset(ModelKind), devices=frozenset({"cpu"}), quantizes=frozenset(_QUANTIZED)
    )
    options: ClassVar[type[BaseModel]] = LlamaCppOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)
    health_path: ClassVar[str] = "/props"
    token_metrics: ClassVar[TokenMetrics | None] = TokenMetrics(
        "/metrics", "llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"
    )
    parameters: ClassVar[frozenset[str] | None] = _PARAMETERS

    def argv(self, model: str, served_name: str, options: LlamaCppOptions) -> tuple[str, ...]:
        """Return the command that serves `model` under `served_name` on the port that the launcher chose."""
        given: dict[str, object] = {
            "model": model, "served-name": served_name, "interpreter": environments.interpreter(self.name),
            "port": PORT_ARGUMENT, "fd": DESCRIPTOR_ARGUMENT, "precision": options.precision, "slots": options.slots,
            "context-tokens": options.context_tokens, "cache-tokens": options.kv_cache_tokens,
            "max-tokens": options.max_tokens, "threads": options.threads or available_cores(),
        }  # fmt: skip
        flags = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
        return (*self.interpreter, "-m", "sage.llm.workers", "llamacpp", *flags)

    def is_ready_answer(self, server: ServerRecord, status: int, content: bytes) -> bool:
        """Return whether the status is 200 and the answer contains the name of the server's model."""
        return status == 200 and parsed(content).get("model_alias") == server.served_name

    def limits(self, content: bytes) -> Mapping[str, Any]:
        """Return the limits that the server reports."""
        found = parsed(content)
        settings = found.get("default_generation_settings") or {}
        return {"context_tokens": settings.get("n_ctx"), "slots": found.get("total_slots")}

    def can_join(self, adapter: Path, base: Path) -> str:
        """Return why a running server cannot load an adapter, as a clause without a period."""
        return "llama.cpp loads adapters only when it starts"

    def estimate(self, model: ModelSource, options: LlamaCppOptions) -> MemoryEstimate | None:
        """Return the estimated memory of the server, or None if the sizes of the model are not known."""
        sizes = sizes_of(model.base or model)
        if sizes is None:
            return None
        is_original = model.kind is ModelKind.GGUF and options.precision is None
        if is_original:
            weights_bytes = sum(file.stat().st_size for file in model.folder.glob("*.gguf"))
        else:
            weights_bytes = int(sizes.parameters * PRECISIONS[options.precision or "f32"])
        context = min(sizes.max_position_embeddings, options.context_tokens or CONTEXT_TOKENS)
        tokens = options.kv_cache_tokens or max(context, options.slots * SLOT_TOKENS)
        is_exact = not is_original and options.precision in (None, "f32")  # whether keys and values are in fp32
        logits_bytes = _BATCH_TOKENS * sizes.vocab_size * 4
        breakdown = ServingEstimate(
            _FRAMEWORK_BYTES + logits_bytes, weights_bytes, 0, tokens * token_bytes(sizes, 4 if is_exact else 2)
        )
        return MemoryEstimate(breakdown, breakdown.total_bytes)
