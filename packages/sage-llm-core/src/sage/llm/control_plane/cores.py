"""Share the CPU cores among engines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sage.llm.client.types import EngineKind
from sage.llm.control_plane.actions import Action, Launch
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState


@dataclass(frozen=True)
class Cores:
    """The CPU cores of this node."""

    count: int
    training_threads: int | None = None  #: threads of each training run, from the settings; None: not set


def with_threads(actions: Sequence[Action], servers: Iterable[ServerRecord], cores: Cores) -> list[Action]:
    """Set the number of CPU threads in each launch of a new server that uses the CPU, and return all actions.

    servers: the servers of this node. This function does not change the threads of running servers.
    """
    launches = {action.engine.id: action.engine for action in actions if _takes_cores(action)}
    if not launches:
        return list(actions)
    hosts = [server for server in servers if server.state is not ServerState.CLOSING and _uses_cpu(server.devices)]
    requested = {server.id: _requested_by(server, cores) for server in hosts}
    requested |= {engine.id: _requested(engine, cores) for engine in launches.values()}
    shares = share_cores(cores.count, requested)
    threads = {key: engine.threads if _keeps_threads(engine, cores) else shares[key] for key, engine in launches.items()}
    return [
        replace(action, threads=threads[action.engine.id]) if isinstance(action, Launch) and _takes_cores(action) else action
        for action in actions
    ]


def share_cores(cores: int, engines: Mapping[str, int | None]) -> dict[str, int]:
    """Return the number of threads of each engine, at least 1.

    engines: the number of threads that the user requested, by engine id. None: no request. An engine with a request gets the
    requested number. The other engines get equal shares of the remaining cores.
    """
    requested = {engine: threads for engine, threads in engines.items() if threads is not None}
    others = [engine for engine in engines if engine not in requested]
    share, rest = divmod(max(0, cores - sum(requested.values())), max(1, len(others)))
    shares = {engine: max(1, share + (place < rest)) for place, engine in enumerate(others)}
    return {engine: {**requested, **shares}[engine] for engine in engines}


@dataclass(frozen=True)
class CpuServer:
    """A running server that uses the CPU."""

    id: str
    threads: int | None  #: None: one thread for each core
    is_adjustable: bool  #: whether the server can change its number of threads while it runs
    is_active: bool  #: whether the server trains, or has answered requests in the last seconds


def new_threads(cores: int, servers: Sequence[CpuServer]) -> dict[str, int]:
    """Return the new number of threads of each adjustable server. Servers that keep their number of threads are omitted.

    Active servers share the cores. An idle server gets no share, and keeps its number of threads until it is active.
    """
    active = [each for each in servers if each.is_active]
    shares = share_cores(cores, {each.id: None if each.is_adjustable else each.threads or cores for each in active})
    return {each.id: shares[each.id] for each in active if each.is_adjustable and each.threads != shares[each.id]}


def cpu_servers(
    engines: Iterable[EngineRecord], servers: Mapping[str, ServerRecord], observed: Mapping[str, Observed], cores: Cores
) -> list[CpuServer]:
    """Return the servers that are ready and compute on the CPU."""
    found: dict[str, CpuServer] = {}
    for engine in engines:
        server, seen = servers.get(engine.server_id or ""), observed.get(engine.id)
        if server is None or seen is None or not seen.ready or server.id in found:
            continue
        if server.state is ServerState.LAUNCHED and _uses_cpu(server.devices):
            requested = _requested_by(server, cores)
            is_adjustable = seen.threads is not None and requested is None
            threads = seen.threads or requested or engine.threads
            found[server.id] = CpuServer(server.id, threads, is_adjustable, seen.is_active)
    return list(found.values())


def _takes_cores(action: Action) -> bool:
    return isinstance(action, Launch) and action.server is None and _uses_cpu(action.devices)


def _uses_cpu(devices: Sequence[str] | None) -> bool:
    return not devices or "cpu" in devices


def _keeps_threads(engine: EngineRecord, cores: Cores) -> bool:
    """Return whether a resumed run keeps its number of threads. With another number, the losses would differ slightly."""
    return engine.kind is EngineKind.FINETUNE and engine.server_id is not None and cores.training_threads is None


def _requested(engine: EngineRecord, cores: Cores) -> int | None:
    if engine.kind is EngineKind.FINETUNE:
        return engine.threads if _keeps_threads(engine, cores) else cores.training_threads
    return engine.options.get("threads")


def _requested_by(server: ServerRecord, cores: Cores) -> int | None:
    return cores.training_threads if server.options is None else server.options.get("threads")
