"""Our own small server around transformers' `generate`: every model, every processor."""

import sys
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class TransformersOptions(BaseModel):
    """What a user may set for an llm engine."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Numbers to compute in; auto: fp32 on a CPU.")
    max_tokens: int = Field(1024, ge=1, description="Length of an answer if the request does not say, in tokens.")


class TransformersBackend:
    """Serves a base model, or a base with its adapter merged into it."""

    options: ClassVar[type[BaseModel]] = TransformersOptions
    health_path: ClassVar[str] = "/health"

    def argv(self, model: str, port: int, descriptor: int, options: TransformersOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the inherited socket `descriptor`, which listens at `port`."""
        return (
            sys.executable, "-m", "sage.llm.workers.generation", "--model", model, "--port", str(port),
            "--fd", str(descriptor), "--dtype", options.dtype, "--max-tokens", str(options.max_tokens),
        )  # fmt: skip
