"""The backend interface: a program that runs engines.

To add one: write a class here that has the attributes of `ServingBackend`, and add it to `BACKENDS` of `registry.py`.
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
    """What a backend can do."""

    kinds: frozenset[EngineKind]
    formats: frozenset[ModelKind]  #: that it can load
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    hot_adapters: bool = False  #: adapters can be loaded and unloaded while it runs
    sleep: bool = False  #: it can release its memory and take it again without a restart


class Backend(Protocol):
    """A program that runs engines."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    #: What a user may set.
    options: ClassVar[type[BaseModel]]
    #: The beginning of its command; `sys.executable` for a program in SAGE's own environment.
    interpreter: ClassVar[tuple[str, ...]]

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        """Return the memory that it is expected to need, or None if that is not known."""


@runtime_checkable
class ServingBackend(Backend, Protocol):
    """An inference server that speaks OpenAI's HTTP."""

    #: Once the server is ready, this path answers 200 and a JSON object whose `engine` is SAGE_ENGINE_ID of its environment.
    health_path: ClassVar[str]

    def argv(self, model: str, options: Any) -> tuple[str, ...]:
        """Return the command, with PORT_ARGUMENT or DESCRIPTOR_ARGUMENT for what the launcher fills in."""

    def model_name(self, engine: EngineRecord) -> str | None:
        """Return the engine's name in requests to its server; None: requests are forwarded unchanged."""


def parameter_count(model: ModelSource) -> int | None:
    """Return the number of a model's parameters, by the headers of its weights, with those of its base; None if unknown."""
    files = sorted(model.folder.glob("*.safetensors"))
    base = parameter_count(model.base) if model.base else 0
    if not files or base is None:
        return None
    shapes: list[list[int]] = [tensor["shape"] for file in files for tensor in safetensors_header(file).values()]
    return base + sum(map(math.prod, shapes))
