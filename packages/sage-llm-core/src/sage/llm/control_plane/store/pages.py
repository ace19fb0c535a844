"""Queries for pages of engines. The cost of a query does not depend on the total number of engines."""

from collections.abc import Collection
from itertools import product
from typing import Any

from sqlalchemy import Connection, Select, false, select, union_all

from sage.common.errors import ConfigError
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.store.tables import engines

_ORDER = engines.c.first_event


def position(connection: Connection, engine_id: str) -> int:
    """Return the position of an engine in the order of creation. Raises ConfigError if no engine has the id."""
    found = connection.scalar(select(_ORDER).where(engines.c.id == engine_id))
    if found is None:
        raise ConfigError(
            code="cursor_unknown",
            message=f"after: there is no engine '{engine_id[:100]}'; perhaps it was removed.",
            hint="Omit `after` to start at the first page.",
            param="after",
        )
    return int(found)


def page_query(
    limit: int,
    behind: int | None,
    states: Collection[EngineState] | None,
    kinds: Collection[EngineKind] | None,
    node: str | None,
    newest_first: bool,
) -> Select[Any]:
    """Return the query for one page of engines.  behind: the position after which the page starts."""
    order = _ORDER.desc() if newest_first else _ORDER.asc()

    def in_order(query: Select[Any]) -> Select[Any]:
        if behind is not None:
            query = query.where(_ORDER.__lt__(behind) if newest_first else _ORDER.__gt__(behind))
        return query.order_by(order).limit(limit)

    if states is None and kinds is None and node is None:
        return in_order(select(engines))
    of_node = select(_ORDER) if node is None else select(_ORDER).where(engines.c.node == node)
    ranges = [
        in_order(of_node.where(engines.c.state == state, engines.c.kind == kind)).subquery()
        for state, kind in product(EngineState if states is None else states, EngineKind if kinds is None else kinds)
    ]
    if not ranges:
        return select(engines).where(false())
    merged = union_all(*(select(found) for found in ranges)).subquery()
    newest = merged.c.first_event.desc() if newest_first else merged.c.first_event.asc()
    return select(engines).where(_ORDER.in_(select(merged.c.first_event).order_by(newest).limit(limit))).order_by(order)
