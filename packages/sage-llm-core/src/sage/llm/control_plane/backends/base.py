"""The interface of backends. A backend is a program that runs engines.

To add a backend, write a module in this folder with a class that has the attributes of `ServingBackend`. Then add an
instance of the class to `BACKENDS` in registry.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends.memory import MemoryEstimate
from sage.llm.control_plane.store.records import ServerRecord


class ServingOptions(BaseModel):
    """The options that every inference engine has."""

    model_config = ConfigDict(extra="forbid")

    threads: int | None = Field(
        None, ge=1, description="Number of CPU threads; default: an equal share of the cores for each engine."
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Quantization of the weights. Quantized weights need less memory and are faster on a CPU, but "
        "they are less exact.",
    )


class BatchOptions(ServingOptions):
    """The options of SAGE's own servers that compute several answers in one batch."""

    context_tokens: int | None = Field(
        None, ge=16, description="Maximum number of tokens of a prompt plus its answer; default: the model's limit."
    )
    slots: int = Field(16, ge=1, le=1024, description="Maximum number of answers that are generated at the same time.")
    kv_cache_tokens: int | None = Field(
        None,
        ge=16,
        description="Maximum total number of tokens of all prompts and answers in progress. Further answers wait. "
        "Default: no limit.",
    )
    max_tokens: int = Field(1024, ge=1, description="Maximum length of an answer in tokens, if the request sets no limit.")


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a backend."""

    kinds: frozenset[EngineKind]
    formats: frozenset[ModelKind]
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    hot_adapters: bool = False  #: whether adapters can be loaded and unloaded while the server runs
    merges_adapters: bool = True  #: whether the backend can serve a base model into which an adapter is merged
    #: Whether the control plane sends a request to each adapter immediately after the adapter is loaded. Set this if the
    #: first request to an adapter is slow.
    warm_up: bool = False
    quantizes: frozenset[str] = frozenset()  #: values of the option `quantize`, in addition to `none`
    #: GPU memory that a server keeps while it sleeps. The server releases its other GPU memory, and allocates that memory
    #: again when the server wakes up. None: the servers cannot sleep.
    asleep_bytes: int | None = None


class TokenMetrics(NamedTuple):
    """The route of a server's Prometheus metrics, and the names of the counters for prompt and completion tokens."""

    path: str
    prompt: str
    completion: str


class Backend(Protocol):
    """A program that runs engines."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    options: ClassVar[type[BaseModel]]

    def estimate(self, model: ModelSource, options: Any) -> MemoryEstimate | None:
        """Return the memory that the engine is expected to need, or None if this memory is not known."""

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        """Return the total of `estimate`, or None if `estimate` returns None."""


@runtime_checkable
class ServingBackend(Backend, Protocol):
    """A backend whose server has OpenAI's HTTP interface.

    If `hot_adapters` is set, the server also has vLLM's HTTP interface to load and unload adapters.
    """

    health_path: ClassVar[str]
    #: Request fields that the server supports. The gateway rejects all others. None: the server checks the fields itself.
    parameters: ClassVar[frozenset[str] | None]
    #: The server's Prometheus counters for tokens. None: the server has no such counters.
    token_metrics: ClassVar[TokenMetrics | None]

    def argv(self, model: str, served_name: str, options: Any) -> tuple[str, ...]:
        """Return the command that serves `model`.

        In the command, the launcher replaces PORT_ARGUMENT with the port, and DESCRIPTOR_ARGUMENT with the file descriptor
        of the listening socket.
        served_name: the name of the model in requests to the server.
        """

    def environment(self, options: Any) -> Mapping[str, str]:
        """Return additional environment variables for the process."""

    def is_ready_answer(self, server: ServerRecord, status: int, content: bytes) -> bool:
        """Return whether an answer of `health_path` comes from `server` and reports that `server` is ready."""

    def limits(self, content: bytes) -> Mapping[str, Any]:
        """Return the fields of an answer of `health_path`. Every field is optional.

        context_tokens: maximum number of tokens of a prompt plus its answer.
        slots: maximum number of concurrent answers.
        tokens: for each model, the numbers of prompt tokens and completion tokens since the model was loaded.
        threads: number of CPU threads, if this number can be changed.  is_active: whether the server has answered requests
        in the last seconds.
        """

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return why a running server of `base` cannot load `adapter`, or None if the server can load `adapter`.

        The reason is a clause without a period.
        """

    def max_adapters(self, options: Any) -> int | None:
        """Return the maximum number of adapters in a server. None: no limit."""


#: Spin iterations of a GNU OpenMP thread that waits at a barrier. With the default of 300,000 (about a millisecond),
#: a server was seven times slower on two cores that other processes also used.
_SPIN_COUNT = "10000"


def thread_variables(threads: int | None) -> dict[str, str]:
    """Return the OpenMP variables: the spin iterations and, if `threads` is given, the number of CPU threads."""
    return {"GOMP_SPINCOUNT": _SPIN_COUNT, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


class WorkerBackend:
    """Methods that are the same for all backends of SAGE's own servers."""

    health_path: ClassVar[str] = "/health"
    parameters: ClassVar[frozenset[str] | None] = None
    token_metrics: ClassVar[TokenMetrics | None] = None

    def environment(self, options: Any) -> Mapping[str, str]:
        """Return the OpenMP variables, which set the spin iterations and the number of CPU threads."""
        return thread_variables(options.threads)

    def is_ready_answer(self, server: ServerRecord, status: int, content: bytes) -> bool:
        """Return whether the answer contains the token that the server's process received in an environment variable."""
        return status == 200 and bool(parsed(content).get("engine") == server.token)

    def limits(self, content: bytes) -> Mapping[str, Any]:
        """Return all fields of the answer."""
        return parsed(content)

    def estimate(self, model: ModelSource, options: Any) -> MemoryEstimate | None:
        """Return None, because the memory is not known."""
        return None

    def memory_bytes(self, model: ModelSource, options: Any) -> int | None:
        """Return the total of `estimate`, or None if `estimate` returns None."""
        estimate = self.estimate(model, options)
        return None if estimate is None else estimate.total_bytes

    def can_join(self, adapter: Path, base: Path) -> str | None:
        """Return None, because the server can load every adapter."""
        return None

    def max_adapters(self, options: Any) -> int | None:
        """Return None, because the number of adapters is not limited."""
        return None


def parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`, or {} if `content` is not a JSON object."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
