"""The routing table: finds the server for the model name of a request, without access to the database."""

import asyncio
import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import DEFAULT_MODEL, SETTLED, EngineKind, EngineState, EventKind
from sage.llm.control_plane.idle import is_making_room, is_paused_by_user, is_pausing
from sage.llm.control_plane.splitting import in_order_of_preference
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.store.routes import RouteRecord
from sage.llm.control_plane.store.store import Store

logger = logging.getLogger(__name__)
_FOLLOW_SECONDS = 0.5
_EVENTS_AT_ONCE = 500
_SHOWN_CHARACTERS = 100
_SHOWN_NAMES = 20


@dataclass(frozen=True)
class Upstream:
    """The server to which a request is sent."""

    address: str  #: HOST:PORT
    model_name: str | None  #: the model name that the server expects; None: the request is forwarded unchanged
    engine_id: str
    name: str  #: name of the engine; responses contain it as `model`
    key: str = ""  #: key that the server requires in requests
    parameters: frozenset[str] | None = None  #: request fields that the server supports; None: the server checks the fields


@dataclass(frozen=True)
class Route:
    """The values of an engine that are needed to route requests to it."""

    engine_id: str
    name: str
    model: str
    kind: EngineKind
    state: EngineState
    first_event: int
    last_event: int
    version: int
    created_at: datetime
    address: str | None
    token: str | None
    backend: str
    model_name: str | None
    idle_stop_minutes: float | None
    #: whether the engine gets the state `paused` after the state `stopping`. If so, requests that arrive while the engine
    #: is stopping wait until the engine is loaded again.
    is_pausing: bool
    #: `user`, or the id of the engine for which this engine makes room. None: this engine is not paused, or is paused
    #: because there were no requests.
    paused_by: str | None


@dataclass
class _Group:
    """The engines that match one key of the table, as sorted pairs (order, engine id). The preferred engine is last."""

    running: list[tuple[int, str]] = field(default_factory=list)
    starting: list[tuple[int, str]] = field(default_factory=list)


class RoutingTable:
    """The active engines of a node, indexed by id, name and model. Stopped, completed and failed engines are not active.

    Use a table in one event loop only.
    """

    def __init__(self, node: str, on_wanted: Callable[[str], None] = lambda _: None) -> None:
        """on_wanted: called if the first choice for a request is a paused engine, and a running engine gets the request.

        The argument is the id of the paused engine.
        """
        self._node, self._on_wanted = node, on_wanted
        self._routes: dict[str, Route] = {}
        self._named: dict[str, RouteRecord] = {}
        self._groups: dict[tuple[EngineKind, str], _Group] = {}
        self._changed = asyncio.Event()
        self._loading = asyncio.Lock()

    def apply(self, engine: EngineRecord, server: ServerRecord | None) -> None:
        """Update the route of an engine from its record. Ignore a record that is older than the last applied record."""
        known = self._routes.get(engine.id)
        if engine.node != self._node or (known and engine.version < known.version):
            return
        self._drop(engine.id)
        if engine.state not in SETTLED and engine.merges is None:  # an engine that merges an adapter gets no requests
            self._routes[engine.id] = route = Route(
                engine_id=engine.id,
                name=engine.name,
                model=engine.model,
                kind=engine.kind,
                state=engine.state,
                first_event=engine.first_event,
                last_event=engine.last_event,
                version=engine.version,
                created_at=engine.created_at,
                address=server.address if server else None,
                token=server.token if server else None,
                backend=engine.backend,
                model_name=engine.served_as,
                idle_stop_minutes=engine.idle_stop_minutes,
                is_pausing=is_pausing(engine),
                paused_by=engine.paused_by if is_making_room(engine) or is_paused_by_user(engine) else None,
            )
            for entries, order in self._entries(route):
                insort(entries, (order, engine.id))
        self._notify()

    def forget(self, engine_id: str) -> None:
        """Remove an engine that no longer exists."""
        self._drop(engine_id)
        self._notify()

    def get(self, engine_id: str) -> Route | None:
        """Return the route of an engine, or None if the engine is stopped, completed, failed or unknown."""
        return self._routes.get(engine_id)

    def routes(self, kind: EngineKind) -> list[Route]:
        """Return the engines of a kind: first the running engines, then the engines that do not run yet."""
        return list(self._newest_first(kind))

    def find(self, model: str, kind: EngineKind, is_responsive: Callable[[str], bool], client: str | None = None) -> Route:
        """Return the engine that answers a request.

        model: the name of a route; the id, name or model of an engine; or `sage-default`.
        client: identifies the sender of the request. A route sends all requests of a client to the same engine.
        If no running engine responds, an engine that does not run yet is returned. The request waits until this engine runs.
        Raises Overloaded if all matching engines run but do not respond. Raises NotFound if no engine matches.
        """
        groups = [self._groups.get((kind, key), _NO_ENGINES) for key in self._keys_of(model, client)]
        wanted: str | None = None
        for group in groups:
            for _, engine_id in reversed(group.running):
                if is_responsive(engine_id):
                    if wanted:
                        self._on_wanted(wanted)
                    return self._routes[engine_id]
            if group.starting and self._routes[group.starting[-1][1]].state is EngineState.PAUSED:
                wanted = wanted or group.starting[-1][1]
        for group in groups:
            if group.starting:
                return self._routes[group.starting[-1][1]]
        for group in groups:
            if group.running:
                raise unresponsive(group.running[-1][1])
        raise self._not_found(model, kind)

    def set_named_routes(self, routes: Iterable[RouteRecord]) -> None:
        """Store `routes` as the routes that users have defined. Earlier routes of users are dropped."""
        self._named = {route.name: route for route in routes}
        self._notify()

    def named_routes(self) -> list[RouteRecord]:
        """Return the routes that users have defined."""
        return list(self._named.values())

    def newest(self, key: str, kind: EngineKind) -> Route | None:
        """Return the newest running engine with this id, name or model.

        If no matching engine runs, return the newest matching engine that does not run yet, or None.
        """
        group = self._groups.get((kind, key), _NO_ENGINES)
        entries = group.running or group.starting
        return self._routes[entries[-1][1]] if entries else None

    def next_change(self) -> asyncio.Event:
        """Return an event that is set when the table changes after this call."""
        return self._changed

    async def load(self, store: Store) -> int:
        """Read all active engines and all routes. Return the position in the change feed at which `follow` must start."""
        cursor = await asyncio.to_thread(store.last_event)
        await self.load_named_routes(store)
        servers = {server.id: server for server in await asyncio.to_thread(store.servers, self._node)}
        for engine in await asyncio.to_thread(store.active, self._node):
            self.apply(engine, servers.get(engine.server_id or ""))
        return cursor

    async def load_named_routes(self, store: Store) -> None:
        """Read all routes from the database.

        Concurrent calls run one after another, so that an older result never replaces a newer result.
        """
        async with self._loading:
            self.set_named_routes(await asyncio.to_thread(store.routes, self._node))

    async def follow(self, store: Store, cursor: int) -> None:
        """Apply the events of the change feed after `cursor`, including events from other processes, until cancelled."""
        while True:
            try:
                cursor = await self._take_in(store, cursor)
            except Exception as error:
                logger.warning("the change feed cannot be read, retrying", exc_info=error)
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _take_in(self, store: Store, cursor: int) -> int:
        while events := await asyncio.to_thread(store.events, cursor, limit=_EVENTS_AT_ONCE):
            if any(event.kind is EventKind.ROUTE for event in events):
                await self.load_named_routes(store)
            changed = {event.engine_id for event in events} - {""}
            found = await asyncio.to_thread(store.hosted, changed)
            for engine, server in found:
                self.apply(engine, server)
            for engine_id in changed - {engine.id for engine, _ in found}:
                self.forget(engine_id)
            cursor = events[-1].id
        return cursor

    def _drop(self, engine_id: str) -> None:
        if route := self._routes.pop(engine_id, None):
            for entries, order in self._entries(route):
                del entries[bisect_left(entries, (order, engine_id))]
            for key in _keys(route):
                group = self._groups.get((route.kind, key))  # None if no group contained the engine, because it was stopping
                if group and not group.running and not group.starting:
                    del self._groups[route.kind, key]

    def _entries(self, route: Route) -> Iterator[tuple[list[tuple[int, str]], int]]:
        if route.state is EngineState.STOPPING and not route.is_pausing:
            return
        for key in _keys(route):
            group = self._groups.setdefault((route.kind, key), _Group())
            if route.state is not EngineState.RUNNING:
                yield group.starting, route.first_event
            else:  # `sage-default` prefers the engine that became ready last; other keys prefer the newest engine
                yield group.running, route.last_event if key == DEFAULT_MODEL else route.first_event

    def _keys_of(self, model: str, client: str | None) -> list[str]:
        if named := self._named.get(model):
            fallback = [named.fallback] if named.fallback else []
            return [*in_order_of_preference(model, named.engines, client), *fallback]
        return [model]

    def _not_found(self, model: str, kind: EngineKind) -> NotFound:
        if named := self._named.get(model):
            targets = ", ".join(target.engine for target in named.engines)
            return NotFound(
                code="model_not_found",
                message=f"No engine of kind {kind} serves the route '{model}'. Engines of the route: {_shortened(targets)}.",
                hint=f"Start one of these engines, or set other engines for the route: `sage route set {model} ENGINE`.",
                param="model",
            )
        wanted = "MODEL" if model == DEFAULT_MODEL else _shortened(model)
        return NotFound(
            code="model_not_found",
            message=f"No engine of kind {kind} serves the model '{_shortened(model)}'; "
            f"available engines: {self._names(kind)}.",
            hint=f"Start an engine: `sage llm engine start {wanted} --engine-kind {kind}`. To resume an engine that "
            "failed or was stopped, find its id with `sage llm engine list`.",
            param="model",
        )

    def _newest_first(self, kind: EngineKind) -> Iterator[Route]:
        group = self._groups.get((kind, DEFAULT_MODEL), _NO_ENGINES)
        for entries in (group.running, group.starting):
            yield from (self._routes[engine_id] for _, engine_id in reversed(entries))

    def _names(self, kind: EngineKind) -> str:
        names = list(dict.fromkeys(route.name for route in islice(self._newest_first(kind), _SHOWN_NAMES + 1)))
        shown = [*names[:_SHOWN_NAMES], "…"] if len(names) > _SHOWN_NAMES else names
        return ", ".join(shown) or "none"

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


_NO_ENGINES = _Group()


def _keys(route: Route) -> set[str]:
    return {route.engine_id, route.name, route.model, DEFAULT_MODEL}


def unresponsive(engine_id: str) -> Overloaded:
    """Return the error for a request to an engine that is alive but does not answer."""
    return Overloaded(
        code="engine_unresponsive",
        message=f"{engine_id} is running, but does not respond.",
        hint=f"Retry, or run `sage llm engine stop --force {engine_id}`, then `sage llm engine resume {engine_id}`.",
    )


def _shortened(model: str) -> str:
    return model if len(model) <= _SHOWN_CHARACTERS else f"{model[:_SHOWN_CHARACTERS]}…"
