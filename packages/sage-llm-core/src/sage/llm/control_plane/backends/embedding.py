"""The backend for SAGE's own embedding server. The server uses sentence-transformers."""

import sys
from typing import ClassVar

from pydantic import BaseModel

from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, WorkerBackend
from sage.llm.control_plane.backends.memory import MemoryEstimate, estimate_server
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT

#: Memory of a server without the model: Python, torch and sentence-transformers. Measured on Linux.
_FRAMEWORK_BYTES = 560_000_000


class EmbeddingOptions(ServingOptions):
    """The options of an embedding engine."""


class EmbeddingBackend(WorkerBackend):
    """Serves `/v1/embeddings`."""

    name: ClassVar[str] = "embedding"
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({EngineKind.EMBEDDING}), frozenset({ModelKind.FULL, ModelKind.HUB})
    )
    options: ClassVar[type[BaseModel]] = EmbeddingOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def argv(self, model: str, served_name: str, options: EmbeddingOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the socket that the launcher passes."""
        listen = ("--port", PORT_ARGUMENT, "--fd", DESCRIPTOR_ARGUMENT)
        return (*self.interpreter, "-m", "sage.llm.workers", "embedding", "--model", model, *listen)

    def estimate(self, model: ModelSource, options: EmbeddingOptions) -> MemoryEstimate | None:
        """Return the memory of the server, with weights in fp32."""
        return estimate_server(
            model, framework_bytes=_FRAMEWORK_BYTES, weight_bytes=4, cache_bytes=0, least_cache_bytes=0
        )  # fmt: skip
