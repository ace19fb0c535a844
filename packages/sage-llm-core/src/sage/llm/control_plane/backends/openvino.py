"""The backend for OpenVINO, which runs models on a CPU in a separate Python environment."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from sage.libs.models.export.formats import OPENVINO_PRECISIONS
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.base import BatchOptions, Capabilities, WorkerBackend
from sage.llm.control_plane.backends.memory import MemoryEstimate, ServingEstimate, cache_tokens, sizes_of, token_bytes
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT

#: Approximate memory of a server without the model: Python and OpenVINO.
_FRAMEWORK_BYTES = 400_000_000


class OpenVinoOptions(BatchOptions):
    """The options of an engine that OpenVINO serves. The weights are fp32 if they are not quantized."""


class OpenVinoBackend(WorkerBackend):
    """Serves one model, or a base model with an adapter merged into it."""

    name: ClassVar[str] = "openvino"
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({EngineKind.LLM}), frozenset(ModelKind), devices=frozenset({"cpu"}),
        quantizes=frozenset(OPENVINO_PRECISIONS) - {"none"},
    )  # fmt: skip
    options: ClassVar[type[BaseModel]] = OpenVinoOptions

    def argv(self, model: str, served_name: str, options: OpenVinoOptions) -> tuple[str, ...]:
        """Return the command that serves `model` under `served_name` on the socket that the launcher passes."""
        given: dict[str, object] = {
            "model": model, "served-name": served_name, "port": PORT_ARGUMENT, "fd": DESCRIPTOR_ARGUMENT,
            "quantize": options.quantize, "slots": options.slots, "max-tokens": options.max_tokens,
            "context-tokens": options.context_tokens, "cache-tokens": options.kv_cache_tokens,
            "threads": options.threads or os.cpu_count(),
        }  # fmt: skip
        flags = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
        return (environments.interpreter(self.name), "-P", "-m", "sage.llm.workers", "openvino", *flags)

    def environment(self, options: OpenVinoOptions) -> Mapping[str, str]:
        """Return additional environment variables: the number of threads, and the path of SAGE's packages."""
        return {
            **super().environment(options),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if Path(path).is_dir()),
        }

    def can_join(self, adapter: Path, base: Path) -> str:
        """Return why a running server cannot load an adapter, as a clause without a period."""
        return "OpenVINO serves only adapters that are merged into their base"

    def estimate(self, model: ModelSource, options: OpenVinoOptions) -> MemoryEstimate | None:
        """Return the estimated memory of the server, or None if the sizes of the model are not known."""
        sizes = sizes_of(model.base or model)
        if sizes is None:
            return None
        weights_bytes = int(sizes.parameters * OPENVINO_PRECISIONS[options.quantize])
        context = min(sizes.max_position_embeddings, options.context_tokens or sizes.max_position_embeddings)
        tokens = cache_tokens(context, options.slots, is_limited=options.context_tokens is not None)
        breakdown = ServingEstimate(_FRAMEWORK_BYTES, weights_bytes, 0, tokens * token_bytes(sizes, 4))
        return MemoryEstimate(breakdown, breakdown.total_bytes - (tokens - context) * token_bytes(sizes, 4))
