"""The backend for SAGE's own server for embeddings, which uses sentence-transformers."""

import sys
from typing import ClassVar

from pydantic import BaseModel

from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.base import Capabilities, ServingOptions, WorkerBackend, parameter_count
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT


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
        return (*self.interpreter, "-m", "sage.llm.workers.embedding", "--model", model, *listen)

    def memory_bytes(self, model: ModelSource, options: EmbeddingOptions) -> int | None:
        """Return the size of the weights in memory, in fp32."""
        parameters = parameter_count(model)
        return parameters and parameters * 4
