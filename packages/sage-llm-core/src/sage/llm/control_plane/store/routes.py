"""Routes in the database. A route is a model name that refers to one or more engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, insert, select

from sage.common.errors import NotFound
from sage.llm.client.types import EventKind, RouteTarget
from sage.llm.control_plane.store.clock import clock
from sage.llm.control_plane.store.feed import FeedStore
from sage.llm.control_plane.store.records import Lease
from sage.llm.control_plane.store.rows import in_utc
from sage.llm.control_plane.store.tables import routes


@dataclass(frozen=True)
class RouteRecord:
    """A route of a node."""

    name: str
    engines: tuple[RouteTarget, ...]
    fallback: str | None  #: the engine that answers if no engine of `engines` answers
    updated_at: datetime


class RouteStore(FeedStore):
    """The methods of the store for routes."""

    def routes(self, node: str) -> list[RouteRecord]:
        """Return the routes of a node, sorted by name."""
        query = select(routes).where(routes.c.node == node).order_by(routes.c.name)
        with self._read() as connection:
            return [
                RouteRecord(
                    name=row.name,
                    engines=tuple(RouteTarget(**target) for target in row.engines),
                    fallback=row.fallback,
                    updated_at=in_utc(row.updated_at),
                )
                for row in connection.execute(query)
            ]

    def set_route(
        self, name: str, engines: Sequence[RouteTarget], fallback: str | None, *, actor: str, lease: Lease
    ) -> None:
        """Create or replace a route, and add an event to the change feed."""
        targets = [target.model_dump() for target in engines]
        with self._fenced(lease, lease.node) as connection:
            shares = ", ".join(f"{target.engine}={target.weight}" for target in engines)
            self._event(connection, "", EventKind.ROUTE, actor, reason=shares, route=name)  # from now on, other writers wait
            connection.execute(delete(routes).where(routes.c.node == lease.node, routes.c.name == name))
            row = {"node": lease.node, "name": name, "engines": targets, "fallback": fallback, "updated_at": clock()}
            connection.execute(insert(routes).values(row))

    def remove_route(self, name: str, *, actor: str, lease: Lease) -> None:
        """Delete a route, and add an event to the change feed. Raises NotFound if the route does not exist."""
        with self._fenced(lease, lease.node) as connection:
            self._event(connection, "", EventKind.ROUTE, actor, reason="removed", route=name)
            if not connection.execute(delete(routes).where(routes.c.node == lease.node, routes.c.name == name)).rowcount:
                raise route_not_found(name)


def route_not_found(name: str) -> NotFound:
    """Return the error for a route that does not exist."""
    return NotFound(code="route_not_found", message=f"No route '{name}'.", hint="`sage route list` shows all routes.",
                    param="name")  # fmt: skip
