"""Plan when the adapters of engines that share a server are loaded, replaced and unloaded."""

from collections.abc import Mapping

from sage.llm.client.types import EngineState
from sage.llm.control_plane.actions import Action, LoadAdapter, Revise, Transition, UnloadAdapter
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.hosting import Hosts
from sage.llm.control_plane.idle import reason_of_stop, state_without_process
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, internal_prefix
from sage.llm.control_plane.watch import Watch

#: After an adapter was loaded, it is not loaded again for this number of seconds, because the last observation of the server
#: may have been made before the adapter was loaded.
_LOOK_SECONDS = 5.0


def is_misplaced(engine: EngineRecord, server: ServerRecord | None) -> bool:
    """Return whether an engine needs a separate server, because the shared server has refused the engine's adapter."""
    return server is not None and server.shared and engine.base is None


def has_joined(engine: EngineRecord, server: ServerRecord | None) -> bool:
    """Return whether an engine uses a server that was planned for another engine."""
    return server is not None and server.shared and not (server.served_name or "").startswith(internal_prefix(engine.id))


def is_refused(engine: EngineRecord) -> bool:
    """Return whether the server of a running engine has refused a newer version of the engine's adapter."""
    return engine.reason is not None and engine.reason.code == "adapter_refused"


def load(engine: EngineRecord, server: ServerRecord, observed: Observed) -> Action:
    """Return the next action for a starting engine whose server answers."""
    if engine.adapter is None:
        return Transition(engine, EngineState.RUNNING, values={"served_as": server.served_name})
    if engine.internal_name not in observed.models:
        return LoadAdapter(engine, server)
    return Transition(engine, EngineState.RUNNING, values={"served_as": engine.internal_name})


def keep(
    engine: EngineRecord, server: ServerRecord, observed: Observed, hosts: Hosts, watches: Mapping[str, Watch]
) -> Action | None:
    """Return the next action for the adapters on a running engine's server, or None."""
    answers_older = is_refused(engine) and engine.served_as in observed.models
    if engine.adapter is not None and not answers_older:
        is_recent = engine.served_as == engine.internal_name and watches[engine.id].served_seconds < _LOOK_SECONDS
        if engine.internal_name not in observed.models and not is_recent:
            return LoadAdapter(engine, server)
        if engine.served_as != engine.internal_name:
            return Revise(engine)
    name = hosts.unneeded(engine, server, observed.models, watches)
    return UnloadAdapter(engine, server, name) if name else None


def unload(engine: EngineRecord, server: ServerRecord, observed: Observed) -> Action:
    """Return the next action for an engine that leaves a shared server."""
    loaded = observed.models & {engine.internal_name, engine.served_as}
    return UnloadAdapter(engine, server, min(loaded)) if engine.adapter and loaded else leave(engine)


def leave(engine: EngineRecord) -> Transition:
    """Return the transition with which an engine leaves a server that other engines use."""
    return Transition(engine, state_without_process(engine), reason_of_stop(engine), must_remain=True)
