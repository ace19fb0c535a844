"""The backend for SAGE's own trainer. Each run has its own process, whose command `FinetuneManager` returns."""

import sys
from typing import ClassVar

from pydantic import BaseModel

from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import estimate
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.base import Capabilities


class TrainerBackend:
    """Trains adapters, or whole models."""

    name: ClassVar[str] = "trainer"
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset({EngineKind.FINETUNE}), frozenset(ModelKind))
    options: ClassVar[type[BaseModel]] = FinetuneConfig
    interpreter: ClassVar[tuple[str, ...]] = (sys.executable,)

    def memory_bytes(self, model: ModelSource, options: FinetuneConfig) -> int | None:
        """Return the memory that the longest micro-batch needs without quantization; with quantization, it needs less."""
        folder = (model.base or model).folder
        if not any(folder.glob("*.safetensors")):
            return None
        need = estimate(folder, options, bf16=options.precision == "bf16", base_bits=None, int8=False)
        return need.total_bytes(options.pack_tokens or options.batch_size * options.max_seq_length)
