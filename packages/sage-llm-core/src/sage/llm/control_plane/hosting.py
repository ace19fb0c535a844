"""Decide which server an engine joins, and which engine launches a server.

A shared server is a process that can host several engines with the same base model, backend and options.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from sage.llm.client.types import DesiredState, EngineState
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.idle import is_making_room
from sage.llm.control_plane.store.records import INTERNAL, EngineRecord, ServerRecord, ServerState, internal_prefix
from sage.llm.control_plane.store.servers import HOSTED
from sage.llm.control_plane.watch import Watch

#: Backend, model, version of the model's files, and options. Two engines with the same key can share a server.
_Key = tuple[str, str, str | None, str]
#: Seconds for which the previous version of an adapter stays loaded after a newer version was loaded. Requests can still use
#: the previous version.
_DRAIN_SECONDS = 5.0


class Hosts:
    """The servers of a snapshot, with the engines that each server hosts."""

    def __init__(
        self, engines: Sequence[EngineRecord], servers: Mapping[str, ServerRecord], observed: Mapping[str, Observed]
    ) -> None:
        self.engines = {engine.id: engine for engine in engines}
        self._hosted: defaultdict[str, list[EngineRecord]] = defaultdict(list)
        self._running: dict[str, EngineRecord] = {}
        self._launchers: dict[str, EngineRecord] = {}
        self._adapters: Counter[str] = Counter()
        self._with_base: set[str] = set()  #: ids of servers that host an engine of the base model without an adapter
        self._dead: set[str] = set()
        self._launching: set[_Key] = set()
        for engine in engines:
            seen = observed.get(engine.id)
            if engine.server_id and seen and (seen.orphaned or not seen.alive):
                self._dead.add(engine.server_id)
            if engine.server_id is None or engine.state not in HOSTED:
                continue
            self._hosted[engine.server_id].append(engine)
            self._count(engine, engine.server_id)
            if engine.state is EngineState.RUNNING:
                self._running.setdefault(engine.server_id, engine)
            elif engine.state is EngineState.STARTING and engine.desired is DesiredState.RUNNING:
                # If an engine requests a port, this engine launches the server, because the server must listen on this port.
                launcher = engine if engine.requested_port else self._launchers.get(engine.server_id, engine)
                self._launchers[engine.server_id] = launcher
        self._servers = servers.values()
        self._ports = {_port(server): server for server in self._servers}

    @cached_property
    def _shared(self) -> Mapping[_Key, list[ServerRecord]]:
        found: defaultdict[_Key, list[ServerRecord]] = defaultdict(list)
        for server in self._servers:
            if server.shared and server.state not in (ServerState.CLOSING, ServerState.SLEEPING):
                found[_key_of(server)].append(server)
        return found

    @cached_property
    def _asleep(self) -> list[ServerRecord]:
        # While a server hosts an engine, it is still falling asleep and has not released its memory.
        asleep = (each for each in self._servers if each.state is ServerState.SLEEPING and not self._hosted.get(each.id))
        return [each for each in asleep if not self._is_gone(each)]

    def engines_on(self, server_id: str) -> Sequence[EngineRecord]:
        """Return the engines that a server hosts."""
        return self._hosted.get(server_id, ())

    def is_last(self, engine: EngineRecord) -> bool:
        """Return whether the engine's server hosts no other engine."""
        return len(self._hosted[engine.server_id or ""]) <= 1

    def is_launcher(self, engine: EngineRecord) -> bool:
        """Return whether this engine, and no other engine of the same server, launches the server."""
        return self._launchers.get(engine.server_id or "") is engine

    def is_serving_others(self, engine: EngineRecord) -> bool:
        """Return whether the server of a starting engine serves other engines."""
        return (engine.server_id or "") in self._running

    def server_for(self, engine: EngineRecord) -> ServerRecord | None:
        """Return the server that an engine joins, or None if no server fits.

        If a server fits, the engine counts as hosted by this server from now on.
        """
        if engine.base is None:
            return None
        for server in self._shared[_key(engine.backend, engine.base, engine.base_version, engine.options)]:
            has_port = engine.requested_port in (None, _port(server))
            is_usable = not self._is_gone(server) and not self._makes_room(server)
            if has_port and is_usable and self._has_room(server, engine):
                self._count(engine, server.id)
                return server
        return None

    def asleep_for(self, engine: EngineRecord) -> ServerRecord | None:
        """Return the sleeping server that an engine can wake, or None if no sleeping server fits."""
        for server in self._asleep:
            if engine.requested_port not in (None, _port(server)):
                continue
            if server.shared and engine.base:
                is_same = _key_of(server) == _key(engine.backend, engine.base, engine.base_version, engine.options)
            else:
                is_same = server.id == engine.server_id and not server.shared
            if is_same:
                return server
        return None

    def must_wait(self, engine: EngineRecord) -> bool:
        """Return whether an engine must wait before a new server is planned for it.

        A server is dead if its process has exited and its row is not yet deleted. An engine that requests a port waits while
        a server with this port is closing or dead. Other engines wait while a server with their base and options is being
        planned or is dead.
        """
        if engine.requested_port:
            server = self._ports.get(engine.requested_port)
            return server is not None and (server.state is ServerState.CLOSING or self._is_gone(server))
        if engine.base is None:
            return False
        key = _key(engine.backend, engine.base, engine.base_version, engine.options)
        return key in self._launching or any(map(self._is_gone, self._shared[key]))

    def launches(self, engine: EngineRecord) -> None:
        """Record that a server for this engine is being planned."""
        if engine.base is not None:
            self._launching.add(_key(engine.backend, engine.base, engine.base_version, engine.options))

    def unneeded(self, engine: EngineRecord, server: ServerRecord, models: frozenset[str], watches: Mapping[str, Watch]
                 ) -> str | None:  # fmt: skip
        """Return the name of an adapter to unload: an older version, or the adapter of an engine that has left the server.

        Returns None if `engine` is not the oldest running engine of the server, or if no adapter must be unloaded.
        """
        if self._running.get(server.id) is not engine:
            return None
        needed, kept = {server.served_name}, []
        for hosted in self._hosted[server.id]:
            needed |= {hosted.served_as, hosted.internal_name}
            if watches[hosted.id].served_seconds < _DRAIN_SECONDS:
                kept.append(internal_prefix(hosted.id))
        names = (name for name in sorted(models - needed) if name.startswith(INTERNAL))
        return next((name for name in names if not name.startswith(tuple(kept))), None)

    def _count(self, engine: EngineRecord, server_id: str) -> None:
        if engine.adapter is None:
            self._with_base.add(server_id)
        else:
            self._adapters[server_id] += 1

    def _is_gone(self, server: ServerRecord) -> bool:
        return server.state is not ServerState.PLANNED and server.id in self._dead

    def _makes_room(self, server: ServerRecord) -> bool:
        """Return whether all engines of a server are being paused to free the memory of the server for another engine."""
        hosted = self._hosted.get(server.id, ())
        return bool(hosted) and all(map(is_making_room, hosted))

    def _has_room(self, server: ServerRecord, engine: EngineRecord) -> bool:
        if engine.adapter is None:
            return server.id not in self._with_base
        return server.max_adapters is None or self._adapters[server.id] < server.max_adapters


def _port(server: ServerRecord) -> int | None:
    return int(server.address.rpartition(":")[2]) if server.address else None


def _key_of(server: ServerRecord) -> _Key:
    return _key(server.backend, server.model, server.model_version, server.options)


def _key(backend: str, model: str, version: str | None, options: Mapping[str, object] | None) -> _Key:
    return backend, model, version, json.dumps(registry.complete_options(backend, options or {}), sort_keys=True)
