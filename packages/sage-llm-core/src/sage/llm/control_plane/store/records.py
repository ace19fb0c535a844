"""The records of the store: rows of the database as immutable values."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sage.llm.client.types import DesiredState, EngineKind, EngineState, OnBusy, Reason, RestartPolicy

#: Prefix of the model names that the control plane uses in requests to a server.
INTERNAL = "sage-"


@dataclass(frozen=True)
class Lease:
    """The right to write the rows of a node. Each takeover of the lease increments `fence`."""

    node: str
    fence: int


@dataclass(frozen=True)
class LeaderInfo:
    """The control plane that holds the lease of a node."""

    holder: str  #: a random token, different for each start of a control plane
    host: str
    pid: int
    url: str  #: URL of the control plane's gateway; "": there is no gateway


class ServerState(StrEnum):
    """Progress of a server from its launch to its end. The state does not say whether the process is alive."""

    PLANNED = "planned"  #: stored before the launch and replaced by `launched` afterwards, so the process possibly exists
    LAUNCHED = "launched"  #: stored after the launch
    SLEEPING = "sleeping"  #: the server has released its memory; paused engines can wake the server
    WAKING = "waking"  #: stored before the request that wakes the server
    CLOSING = "closing"  #: stored before the signal that ends the process; no engine can join the server any more


@dataclass(frozen=True)
class ServerRecord:
    """A process, planned or launched, that hosts engines.

    When the last engine leaves the server, the server's row is removed, unless the server sleeps.
    """

    id: str  #: `server-` and 10 characters of [a-z0-9]
    node: str
    backend: str  #: name of the backend in the registry of backends
    model: str  #: the model that the process loads
    state: ServerState
    handle: str  #: identifies the process for the launcher; chosen before the launch
    address: str | None  #: HOST:PORT on which the process listens; None before the launch
    devices: tuple[str, ...] | None  #: None: any device
    reserved_bytes: int | None
    version: int  #: incremented by every write
    created_at: datetime
    options: Mapping[str, Any] | None = None  #: options of the backend; None: the engine's `options` apply
    served_name: str | None = None  #: the model name that the server expects in requests; None: any name is accepted
    shared: bool = False  #: whether engines with the same base model, backend and options can join
    max_adapters: int | None = None  #: maximum number of adapters in the server; None: no limit
    model_version: str | None = None  #: `base_version` of the engine that the server was launched for

    @property
    def token(self) -> str:
        """The token that identifies the process: `engine-` and the suffix of the server's id."""
        return token_of(self.id)


@dataclass(frozen=True)
class EngineRecord:
    """An engine: the request of the user, and the current state."""

    id: str  #: `engine-` and 10 characters of [a-z0-9]
    kind: EngineKind
    model: str
    name: str
    backend: str  #: name of the backend in the registry; `auto` was resolved when the engine was created
    options: Mapping[str, Any]
    metadata: Mapping[str, str]
    desired: DesiredState
    force: bool  #: whether the process is killed to reach the state `desired`
    restart_policy: RestartPolicy
    #: Number of automatic restarts since a user started or resumed the engine. If the engine fails after 10 minutes or more
    #: in the state `running`, the count begins at zero again.
    restarts: int
    state: EngineState
    reason: Reason | None
    #: the last TrainingProgress of a run that has ended; it is stored so that listing the engines reads no files
    figures: Mapping[str, Any] | None
    node: str
    server_id: str | None  #: id of the last server that hosted the engine; the server possibly no longer exists
    requested_port: int | None
    devices: tuple[str, ...] | None  #: None: any device
    reserved_bytes: int | None
    version: int  #: incremented by every write
    created_at: datetime
    state_at: datetime
    first_event: int  #: id of the event of the engine's creation; engines are ordered by this id, not by time
    last_event: int  #: id of the event of the engine's last transition
    dedicated: bool = False  #: whether the user requested a server for this engine only
    base: str | None = None  #: the base model that a shared server loads for the engine; None: the server is not shared
    base_version: str | None = None  #: a value that changes if the files of `base` are replaced; None: not known
    adapter: str | None = None  #: folder of the adapter to load into the shared server; None: no adapter
    form: str | None = None  #: how the server loads the model, as text for users
    revision: int = 0  #: incremented at each start and for each newer version of the adapter
    #: Model name in requests to the server. None: the model is not loaded yet, or the server accepts any name.
    served_as: str | None = None
    idle_stop_minutes: float | None = None  #: the engine is unloaded after this time without requests; None: never
    last_request_at: datetime | None = None  #: time of the last recorded request; a pause sets this field to None
    backend_reason: str | None = None  #: why `auto` chose the backend; None: the request named a backend
    #: id of the engine that merges this engine's adapter in the background; "": not started yet; None: no merge is requested
    merger_id: str | None = None
    merges: str | None = None  #: id of the engine whose adapter this engine merges in the background; None: no such engine
    on_busy: OnBusy = OnBusy.WAIT
    priority: int = 0  #: engines with a higher number are ahead in the queue
    not_before: datetime | None = None  #: earliest time to start the engine
    queue_rank: float | None = None  #: sort key of waiting engines that have the same priority; None: `last_event` is used
    #: Cause of the last pause: `idle` (there were no requests), `user`, or the id of the engine that needs the memory. None:
    #: the engine was not paused, or has started again since the pause.
    paused_by: str | None = None
    least_bytes: int | None = None  #: smallest memory with which the engine can run; None: `reserved_bytes`
    #: Number of CPU threads with which the server was launched for the engine. None: the server's program uses its default
    #: number, or the engine has joined a server that already existed.
    threads: int | None = None
    max_restarts: int = 5  #: maximum of `restarts`
    last_crash: str | None = None  #: point at which a training run exited without reporting an error; None: no such exit
    serve: Mapping[str, Any] | None = None  #: the fields of `ServedRun`; None: the training run is not served

    @property
    def internal_name(self) -> str:
        """The model name that stands for the current revision in requests to the server."""
        return f"{internal_prefix(self.id)}{self.revision}"


def internal_prefix(engine_id: str) -> str:
    """Return the prefix that the internal names of all revisions of an engine have in common."""
    return f"{INTERNAL}{suffix_of(engine_id)}-"


def token_of(server_id: str) -> str:
    """Return the token of a server's process: `engine-` and the suffix of the server's id."""
    return f"engine-{suffix_of(server_id)}"


def suffix_of(record_id: str) -> str:
    """Return the suffix of an id. An engine, its first server and its training run have the same suffix."""
    return record_id.partition("-")[2]
