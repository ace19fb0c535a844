"""The backend interface: a program that runs engines.

To add a backend, write a class in this folder with the attributes of `ServingBackend`, and list it in `BACKENDS`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel

from sage.libs.models.resolve import ModelKind, ModelSource, safetensors_header
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.store.records import ServerRecord


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a backend."""

    kinds: frozenset[EngineKind]
    formats: frozenset[ModelKind]  #: model formats that it can load
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    hot_adapters: bool = False  #: adapters can be loaded and unloaded while it runs
    merges_adapters: bool = True  #: it can serve a base with an adapter that is merged into it
    warm_up: bool = False  #: the first request to an adapter is slow, so send one after loading
    sleep: bool = False  #: it can release its memory and allocate it again without a restart


class Backend(Protocol):
    """A program that runs engines."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    #: The options that a user may set.
    options: ClassVar[type[BaseModel]]

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        """Return the memory that the engine is expected to need, or None if it is not known."""


@runtime_checkable
class ServingBackend(Backend, Protocol):
    """An inference server with OpenAI's HTTP interface, and vLLM's for adapters if they can be loaded while it runs."""

    #: The path that tells whether the server is ready.
    health_path: ClassVar[str]
    #: The fields of a request that the server supports; the gateway rejects others. None: the server rejects them.
    parameters: ClassVar[frozenset[str] | None]

    def argv(self, model: str, served_name: str, options: Any) -> tuple[str, ...]:
        """Return the command that serves `model`; the launcher replaces PORT_ARGUMENT and DESCRIPTOR_ARGUMENT in it.

        served_name: the name of the model in requests to the server.
        """

    def environment(self, options: Any) -> Mapping[str, str]:
        """Return additional environment variables of the process."""

    def is_ready_answer(self, server: ServerRecord, status: int, content: bytes) -> bool:
        """Return whether an answer of `health_path` is that of `server`, which is ready, and not of another program."""

    def limits(self, content: bytes) -> Mapping[str, Any]:
        """Return `context_tokens` and `slots` from an answer of `health_path`, if it has them."""

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return why an adapter cannot be loaded into a running base, as the rest of a sentence; None if it can."""

    def max_adapters(self, options: Any) -> int | None:
        """Return how many adapters a server can host; None: any number."""


#: Rounds in which a thread of GNU OpenMP waits actively at a barrier. With its default of 300,000 (about a millisecond), a
#: server on two cores that other processes use too had a seventh of the speed.
_SPIN_COUNT = "10000"


def thread_variables(threads: int | None) -> dict[str, str]:
    """Return the environment variables for a number of CPU threads; None: one for each core."""
    return {"GOMP_SPINCOUNT": _SPIN_COUNT, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


class WorkerBackend:
    """The methods that the backends for SAGE's own servers share."""

    health_path: ClassVar[str] = "/health"
    parameters: ClassVar[frozenset[str] | None] = None

    def environment(self, options: Any) -> Mapping[str, str]:
        """Return the variables for the threads."""
        return thread_variables(options.threads)

    def is_ready_answer(self, server: ServerRecord, status: int, content: bytes) -> bool:
        """Return whether the answer has the token of the server, which its process has from its environment."""
        return status == 200 and bool(parsed(content).get("engine") == server.token)

    def limits(self, content: bytes) -> Mapping[str, Any]:
        """Return the whole answer, which has them."""
        return parsed(content)

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return None."""
        return None

    def max_adapters(self, options: Any) -> int | None:
        """Return None."""
        return None


def parsed(content: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if it is not one."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def parameter_count(model: ModelSource) -> int | None:
    """Return the number of parameters of a model and its base, from the headers of the weights; None if not known."""
    files = sorted(model.folder.glob("*.safetensors"))
    base = parameter_count(model.base) if model.base else 0
    if not files or base is None:
        return None
    shapes: list[list[int]] = [tensor["shape"] for file in files for tensor in safetensors_header(file).values()]
    return base + sum(map(math.prod, shapes))
