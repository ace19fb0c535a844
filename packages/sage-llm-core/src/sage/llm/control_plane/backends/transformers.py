"""The backend for SAGE's own server, which uses transformers' `generate`: it supports every model and every processor."""

import sys
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.base import Capabilities, WorkerBackend, parameter_count
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT


class TransformersOptions(BaseModel):
    """The options of an llm engine."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Data type of the weights; auto: fp32 on a CPU.")
    max_tokens: int = Field(1024, ge=1, description="Length of an answer if the request does not say, in tokens.")


class TransformersBackend(WorkerBackend):
    """Serves a base model, or a base with its adapter merged into it."""

    name: ClassVar[str] = "transformers"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind))
    options: ClassVar[type[BaseModel]] = TransformersOptions
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def argv(self, model: str, served_name: str, options: TransformersOptions) -> tuple[str, ...]:
        """Return the command that serves `model` on the socket that the launcher passes."""
        return (
            *self.interpreter, "-m", "sage.llm.workers.generation", "--model", model, "--port", PORT_ARGUMENT,
            "--fd", DESCRIPTOR_ARGUMENT, "--dtype", options.dtype, "--max-tokens", str(options.max_tokens),
        )  # fmt: skip

    def memory_bytes(self, model: ModelSource, options: TransformersOptions) -> int | None:
        """Return the size of the weights in memory."""
        parameters = parameter_count(model)
        return parameters and parameters * (2 if options.dtype == "bf16" else 4)
