"""The backend interface: a program that runs engines.

To add a backend, write a class in this folder with the attributes of `ServingBackend`, and list it in `BACKENDS`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel

from sage.libs.models.resolve import ModelKind, ModelSource, safetensors_header
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.store.records import EngineRecord


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a backend."""

    kinds: frozenset[EngineKind]
    formats: frozenset[ModelKind]  #: model formats that it can load
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    hot_adapters: bool = False  #: adapters can be loaded and unloaded while it runs
    sleep: bool = False  #: it can release its memory and allocate it again without a restart


class Backend(Protocol):
    """A program that runs engines."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    #: The options that a user may set.
    options: ClassVar[type[BaseModel]]
    #: The first part of its command; `sys.executable` for a program in SAGE's own environment.
    interpreter: ClassVar[tuple[str, ...]]

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        """Return the memory that the engine is expected to need, or None if it is not known."""


@runtime_checkable
class ServingBackend(Backend, Protocol):
    """An inference server with OpenAI's HTTP interface."""

    #: Once the server is ready, this path answers 200 and a JSON object; its `engine` is the variable SAGE_ENGINE_ID.
    health_path: ClassVar[str]

    def argv(self, model: str, options: Any) -> tuple[str, ...]:
        """Return the command; the launcher replaces PORT_ARGUMENT and DESCRIPTOR_ARGUMENT in it."""

    def model_name(self, engine: EngineRecord) -> str | None:
        """Return the model name that the engine's server expects; None: requests are forwarded unchanged."""


def parameter_count(model: ModelSource) -> int | None:
    """Return the number of parameters of a model and its base, from the headers of the weights; None if not known."""
    files = sorted(model.folder.glob("*.safetensors"))
    base = parameter_count(model.base) if model.base else 0
    if not files or base is None:
        return None
    shapes: list[list[int]] = [tensor["shape"] for file in files for tensor in safetensors_header(file).values()]
    return base + sum(map(math.prod, shapes))
