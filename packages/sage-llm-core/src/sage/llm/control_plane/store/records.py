"""The rows of the store as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sage.llm.client.types import DesiredState, EngineKind, EngineState, Reason, RestartPolicy

#: The prefix of the names that models have inside a server.
INTERNAL = "sage-"


@dataclass(frozen=True)
class Lease:
    """The right to write the rows of a node. Every write checks the lease; a takeover increments the fence."""

    node: str
    fence: int


@dataclass(frozen=True)
class LeaderInfo:
    """The control plane that holds the lease of a node."""

    holder: str  #: its token, different for each start of a control plane
    host: str
    pid: int
    url: str  #: URL of its gateway; empty if it has none


class ServerState(StrEnum):
    """Whether the process of a server was started. Whether it is alive and answers is only observed, not stored."""

    PLANNED = "planned"  #: written before the launch; the process may exist or not
    LAUNCHED = "launched"  #: written after the launch
    CLOSING = "closing"  #: written before the signal that ends it; no engine joins it


@dataclass(frozen=True)
class ServerRecord:
    """A process, planned or launched, that hosts one or more engines; the row is removed once the process is gone."""

    id: str  #: `server-` and 10 characters of [a-z0-9]
    node: str
    backend: str  #: name in the registry
    model: str  #: the base model that it loads
    state: ServerState
    handle: str  #: identifies the process for the launcher; chosen before the launch
    address: str | None  #: HOST:PORT that it listens on, known once it is launched
    devices: tuple[str, ...] | None  #: None: any device
    reserved_bytes: int | None
    version: int  #: incremented by every write
    created_at: datetime
    options: Mapping[str, Any] | None = None  #: of its backend; None: those of its engine
    served_name: str | None = None  #: the name of `model` in requests to it; None: it accepts any name
    shared: bool = False  #: other engines with the same base model, backend and options may join it
    max_adapters: int | None = None  #: None: no limit

    @property
    def token(self) -> str:
        """The id by which a process recognises itself: `engine-` and the suffix of the server's id."""
        return f"engine-{suffix_of(self.id)}"


@dataclass(frozen=True)
class EngineRecord:
    """An engine: the request of the user, and the current state."""

    id: str  #: `engine-` and 10 characters of [a-z0-9]
    kind: EngineKind
    model: str
    name: str
    backend: str  #: name in the registry; `auto` was resolved when the engine was created
    options: Mapping[str, Any]
    metadata: Mapping[str, str]
    desired: DesiredState
    force: bool  #: whether to kill the process to reach `desired`
    restart_policy: RestartPolicy
    restarts: int  #: number of restarts since a user last started or resumed it
    state: EngineState
    reason: Reason | None
    figures: Mapping[str, Any] | None  #: its final TrainingProgress, so that lists need not read files
    node: str
    server_id: str | None  #: the last server that hosted it; the row may be gone
    requested_port: int | None
    devices: tuple[str, ...] | None  #: None: any device
    reserved_bytes: int | None
    version: int  #: incremented by every write
    created_at: datetime
    state_at: datetime
    first_event: int  #: orders engines by creation, independent of the clock
    last_event: int  #: orders engines by their last transition, independent of the clock
    dedicated: bool = False  #: the user requested a server for this engine only
    base: str | None = None  #: the model that a shared server loads for it; None: its server is not shared
    adapter: str | None = None  #: folder of the adapter to load into the shared server; None: none
    form: str | None = None  #: how its model is served, for users; written by the validation
    revision: int = 0  #: incremented at each start, and by each newer version of its adapter
    served_as: str | None = None  #: its model name in requests to its server; None: not loaded, or the server accepts any
    idle_stop_minutes: float | None = None  #: it is unloaded after this time without requests; None: never
    last_request_at: datetime | None = None  #: of requests since it was started; written at most every few seconds
    backend_reason: str | None = None  #: why `auto` chose the backend; None: the request named it
    serve: Mapping[str, Any] | None = None  #: the fields of `ServedRun`; None: the run's result is not served

    @property
    def internal_name(self) -> str:
        """The model name, never used twice, of the current revision of its adapter."""
        return f"{internal_prefix(self.id)}{self.revision}"


def internal_prefix(engine_id: str) -> str:
    """Return the prefix of the internal names of an engine."""
    return f"{INTERNAL}{suffix_of(engine_id)}-"


def suffix_of(record_id: str) -> str:
    """Return the suffix of an id; an engine, its first server and its training run have the same suffix."""
    return record_id.partition("-")[2]
