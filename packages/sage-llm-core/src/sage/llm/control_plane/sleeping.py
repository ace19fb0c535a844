"""Plan which servers sleep, and which sleeping servers end.

A sleeping server keeps its process and releases its memory on the GPU.
If the last engine of a server makes room for another engine, the server sleeps instead of exiting. The store
keeps the row of a sleeping server while an engine needs this server. The next engine that starts on the server wakes it.
"""

from collections.abc import Collection, Mapping, Sequence

from sage.llm.client.types import EngineState
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.idle import is_making_room
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState

_ASLEEP = (ServerState.SLEEPING, ServerState.WAKING)
#: States in which an engine can need a sleeping server.
_NEEDING = (
    EngineState.QUEUED, EngineState.PAUSED, EngineState.STARTING, EngineState.RUNNING, EngineState.STOPPING,
)  # fmt: skip


def sleeps(engine: EngineRecord, server: ServerRecord) -> bool:
    """Return whether the server of a stopping engine sleeps instead of exiting.  engine: the last engine of the server."""
    if not is_making_room(engine) or server.state not in (ServerState.LAUNCHED, ServerState.SLEEPING):
        return False
    is_on_gpu = any(device != "cpu" for device in server.devices or ())
    return is_on_gpu and registry.BACKENDS[server.backend].capabilities.asleep_bytes is not None


def is_asleep(engine: EngineRecord, server: ServerRecord | None) -> bool:
    """Return whether an engine is paused or queued while its server sleeps."""
    is_waiting = engine.state in (EngineState.PAUSED, EngineState.QUEUED)
    return is_waiting and server is not None and server.state is ServerState.SLEEPING


def unneeded(
    engines: Sequence[EngineRecord],
    servers: Mapping[str, ServerRecord],
    observed: Mapping[str, Observed],
    evicted: Collection[str],
) -> list[ServerRecord]:
    """Return the sleeping servers that must end.

    A sleeping server must end if no engine needs the server, if its process has exited, or if its memory is needed.
    evicted: ids of the servers whose memory is needed.
    """
    asleep = {server.id: server for server in servers.values() if server.state in _ASLEEP}
    if not asleep:
        return []
    needed = {engine.server_id for engine in engines if engine.state in _NEEDING}
    dead = {
        engine.server_id
        for engine in engines
        if is_asleep(engine, asleep.get(engine.server_id or "")) and engine.id in observed and not observed[engine.id].alive
    }
    return [each for each in asleep.values() if each.id not in needed or each.id in dead or each.id in evicted]
