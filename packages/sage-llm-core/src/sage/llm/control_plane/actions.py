"""The actions of a plan, which the runner executes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sage.llm.client.types import DesiredState, EngineState, Reason
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord


@dataclass(frozen=True)
class Validate:
    """Run the slow checks of an engine in the background."""

    engine: EngineRecord


@dataclass(frozen=True)
class Launch:
    """Start the process of an engine's server, or take over this process if it is already running."""

    engine: EngineRecord
    server: ServerRecord | None  #: None: no server is planned yet
    is_moved: bool = False  #: whether other engines use the engine's previous server; if True, the new server needs a new id
    devices: tuple[str, ...] | None = None  #: the devices that the planned server gets; None: any devices
    reserved_bytes: int | None = None  #: the memory that the planned server gets; None: not known
    threads: int | None = None  #: number of CPU threads for the planned server; None: the default of its program


@dataclass(frozen=True)
class Join:
    """Assign an engine to a server that hosts other engines, or that sleeps."""

    engine: EngineRecord
    server: ServerRecord
    reserved_bytes: int | None = None  #: the memory that a sleeping server gets when it wakes


@dataclass(frozen=True)
class Sleep:
    """Let the server of an engine release memory, and pause the engine."""

    engine: EngineRecord
    server: ServerRecord


@dataclass(frozen=True)
class Wake:
    """Let the server of an engine allocate the released memory again."""

    engine: EngineRecord
    server: ServerRecord


@dataclass(frozen=True)
class LoadAdapter:
    """Load the adapter of an engine into its server."""

    engine: EngineRecord
    server: ServerRecord


@dataclass(frozen=True)
class UnloadAdapter:
    """Unload the adapter `name` from a server. Afterwards, a stopping `engine` gets the state `stopped` or `paused`."""

    engine: EngineRecord
    server: ServerRecord
    name: str


@dataclass(frozen=True)
class Revise:
    """Store that the server has loaded the current version of the engine's adapter."""

    engine: EngineRecord


@dataclass(frozen=True)
class SetDesired:
    """Store a new desired state of an engine."""

    engine: EngineRecord
    desired: DesiredState
    paused_by: str | None = None  #: `idle`, or the id of the waiting engine that needs the memory; None: not paused


@dataclass(frozen=True)
class SendSignal:
    """Send a signal to the processes of a server."""

    engine: EngineRecord
    server: ServerRecord
    signal: Signal
    closes: bool = False  #: whether to mark the server as closing before the signal is sent, so that no engine joins it


@dataclass(frozen=True)
class Transition:
    """Store a new state of an engine. In the same transaction, an engine that ends or is paused leaves its server."""

    engine: EngineRecord
    state: EngineState
    reason: Reason | None = None
    restarts: int | None = None  #: new restart count of an engine that is queued again; None: the engine is not queued again
    must_remain: bool = False  #: whether to raise StaleWrite if no other engine would remain on the server
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Publish:
    """Serve a newer checkpoint or the result of a training run."""

    engine: EngineRecord
    step: int | None  #: step of the checkpoint; None: the result in the output folder


@dataclass(frozen=True)
class StartMerge:
    """Start a second engine, the merger, which merges the adapter of `engine` into the base model."""

    engine: EngineRecord


@dataclass(frozen=True)
class SwapServers:
    """Give an engine the server with the merged model. The merger gets the engine's previous server and is stopped."""

    engine: EngineRecord
    server: ServerRecord
    merger: EngineRecord
    merger_server: ServerRecord


@dataclass(frozen=True)
class EndMerge:
    """Store in an engine's record why the merge of its adapter failed."""

    engine: EngineRecord


Merge = StartMerge | SwapServers | EndMerge
Action = (
    Merge
    | Publish
    | Validate
    | Launch
    | Join
    | Sleep
    | Wake
    | LoadAdapter
    | UnloadAdapter
    | Revise
    | SetDesired
    | SendSignal
    | Transition
)
