"""Plan background merges of adapters. Until a merge is complete, the server of the base model answers requests.

A second engine, the merger, serves the merged model with the fastest backend. When the merger is ready, one database write
swaps the servers of the two engines. The merger then unloads the adapter from the base model's server. If no other engine
uses this server, the server ends with the merger.
"""

from collections.abc import Mapping

from sage.llm.client.types import DesiredState, EngineState
from sage.llm.control_plane.actions import Action, EndMerge, SetDesired, StartMerge, SwapServers
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.watch import Watch

#: For this number of seconds after a swap, gateways may still send requests to the previous server of an engine.
_DRAIN_SECONDS = 5.0


def next_merge(
    engine: EngineRecord,
    server: ServerRecord,
    engines: Mapping[str, EngineRecord],
    servers: Mapping[str, ServerRecord],
    observed: Mapping[str, Observed],
) -> Action | None:
    """Return the next action that merges the adapter of a running engine in the background, or None if no action is due.

    engines: all engines except stopped, completed and failed engines. The keys are engine ids.
    """
    if engine.adapter is None or engine.merger_id is None:
        return None
    if not engine.merger_id:
        return StartMerge(engine)
    merger = engines.get(engine.merger_id)
    if merger is None:
        return EndMerge(engine)
    seen, merger_server = observed.get(merger.id), servers.get(merger.server_id or "")
    is_running = merger.state is EngineState.RUNNING and merger.desired is DesiredState.RUNNING
    if is_running and merger_server and seen and seen.ready:
        return SwapServers(engine, server, merger, merger_server)
    return None


def stop_merger(engine: EngineRecord, engines: Mapping[str, EngineRecord]) -> Action | None:
    """Return the action that stops a merger whose result is no longer needed, or None if `engine` is not such a merger."""
    if engine.merges is None or engine.desired is DesiredState.STOPPED:
        return None
    merged = engines.get(engine.merges)
    is_needed = merged and merged.merger_id == engine.id and merged.desired is DesiredState.RUNNING
    return None if is_needed else SetDesired(engine, DesiredState.STOPPED)


def is_draining(engine: EngineRecord, watch: Watch) -> bool:
    """Return whether gateways may still send requests to the adapter of a stopping merger."""
    return engine.merges is not None and engine.adapter is not None and watch.state_seconds < _DRAIN_SECONDS


def must_unload(engine: EngineRecord, observed: Observed) -> bool:
    """Return whether a merger must unload its adapter before the server ends. Unloading waits for answers in progress."""
    return engine.merges is not None and engine.adapter is not None and engine.served_as in observed.models
