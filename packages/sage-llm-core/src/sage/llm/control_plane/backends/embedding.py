"""Our own small server around sentence-transformers."""

import sys
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class EmbeddingOptions(BaseModel):
    """What a user may set for an embedding engine."""

    model_config = ConfigDict(extra="forbid")


class EmbeddingBackend:
    """Serves `/v1/embeddings`."""

    options: ClassVar[type[BaseModel]] = EmbeddingOptions
    health_path: ClassVar[str] = "/health"

    def argv(self, model: str, port: int, descriptor: int, options: EmbeddingOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the inherited socket `descriptor`, which listens at `port`."""
        where = ("--port", str(port), "--fd", str(descriptor))
        return (sys.executable, "-m", "sage.llm.workers.embedding", "--model", model, *where)
