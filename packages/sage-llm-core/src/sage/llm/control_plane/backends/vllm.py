"""The backend for vLLM, which runs in a separate environment."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from sage.libs.models.hot import why_not_hot
from sage.libs.models.resolve import ModelKind, ModelSource, json_object
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import (
    Capabilities,
    ServingOptions,
    WorkerBackend,
    thread_variables,
)
from sage.llm.control_plane.backends.memory import MemoryEstimate, ServingEstimate, sizes_of
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
_GIB = 2**30
#: Memory of vLLM 0.32 without model, adapters and cache. Derived from the peak in benchmarks/results/serving.md.
_FRAMEWORK_BYTES = 2_350_000_000
#: Memory on the GPU that a sleeping server keeps: the CUDA context, the libraries' workspaces and the CUDA graphs.
_ASLEEP_BYTES = 1_500_000_000
#: Entries of adapter_config.json that vLLM ignores.
_PATTERNS = ("rank_pattern", "alpha_pattern")


class VllmOptions(ServingOptions):
    """The options of an engine that vLLM serves."""

    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of the weights; auto: fp32 on a CPU, vLLM's choice on a GPU."
    )
    context_tokens: int | None = Field(
        None, ge=16, description="Maximum number of tokens of a prompt plus its answer; default: the model's limit."
    )
    slots: int = Field(16, ge=1, le=1024, description="Maximum number of answers that are generated at the same time.")
    kv_cache_gb: int = Field(1, ge=1, description="Size of the key/value cache, in GiB.")
    max_adapters: int = Field(16, ge=1, le=512, description="Maximum number of adapters in one server.")
    max_rank: Literal[8, 16, 32, 64, 128, 256] | None = Field(
        None, description="Largest rank of an adapter; default: 64, or 8 on a CPU. A larger value slows down all adapters."
    )


class VllmBackend(WorkerBackend):
    """Serves a base model and adapters for it."""

    name: ClassVar[str] = "vllm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({EngineKind.LLM}), frozenset(ModelKind), hot_adapters=True, warm_up=True, asleep_bytes=_ASLEEP_BYTES
    )
    options: ClassVar[type[BaseModel]] = VllmOptions

    def argv(self, model: str, served_name: str, options: VllmOptions) -> tuple[str, ...]:
        """Return the command that serves `model` under `served_name` on the socket that the launcher passes."""
        is_cpu = environments.device() == "cpu"
        given: dict[str, object] = {
            "interpreter": environments.interpreter(self.name), "model": model, "served-model-name": served_name,
            "fd": DESCRIPTOR_ARGUMENT, "host": "127.0.0.1", "port": PORT_ARGUMENT,
            "dtype": "float32" if is_cpu and options.dtype == "auto" else _DTYPES[options.dtype],
            "max-num-seqs": options.slots, "max-loras": options.max_adapters, "max-cpu-loras": options.max_adapters,
            "max-lora-rank": options.max_rank or default_rank(is_cpu=is_cpu),
        }  # fmt: skip
        if options.context_tokens:
            given["max-model-len"] = options.context_tokens
        if not is_cpu:
            given["kv-cache-memory-bytes"] = options.kv_cache_gb * _GIB
        flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        switches = ["--enable-lora", "--disable-uvicorn-access-log", *([] if is_cpu else ["--enable-sleep-mode"])]
        return (sys.executable, "-m", "sage.llm.workers", "vllm", *flags, *switches)

    def environment(self, options: VllmOptions) -> Mapping[str, str]:
        """Return additional environment variables for the process."""
        return {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": str(options.kv_cache_gb),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # do not bind threads to cores that other processes use too
            "VLLM_NO_USAGE_STATS": "1",
            **thread_variables(options.threads),
        }

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return why a running vLLM server of `base` cannot load the adapter, or None if the server can load it."""
        if reason := why_not_hot(adapter, base):
            return reason
        config = json_object(adapter / "adapter_config.json")
        pattern = next((name for name in _PATTERNS if config.get(name)), None)
        return f"it uses {pattern}, which vLLM ignores" if pattern else None

    def max_adapters(self, options: VllmOptions) -> int:
        """Return the option `max_adapters`."""
        return options.max_adapters

    def estimate(self, model: ModelSource, options: VllmOptions) -> MemoryEstimate | None:
        """Return the estimated memory of the server, or None if the sizes of the model are not known."""
        sizes = sizes_of(model.base or model)
        if sizes is None:
            return None
        is_cpu = environments.device() == "cpu"
        value_bytes = 4 if options.dtype == "fp32" or (options.dtype == "auto" and is_cpu) else 2
        rank = options.max_adapters * (options.max_rank or default_rank(is_cpu=is_cpu))
        adapters_bytes = rank * sum(sum(shape[-2:]) for shape in sizes.layer_matrices.values()) * value_bytes
        cache_bytes = options.kv_cache_gb * _GIB
        breakdown = ServingEstimate(_FRAMEWORK_BYTES, sizes.parameters * value_bytes, adapters_bytes, cache_bytes)
        return MemoryEstimate(breakdown, breakdown.total_bytes)


def default_rank(*, is_cpu: bool) -> int:
    """Return the default of the option `max_rank`."""
    return 8 if is_cpu else 64
