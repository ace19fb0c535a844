"""The change feed in the database: the events of engines and routes. Other processes read the feed."""

from sqlalchemy import Connection, func, insert, select, text

from sage.llm.client.types import EngineEvent, EngineState, EventKind
from sage.llm.control_plane.store.clock import clock
from sage.llm.control_plane.store.leases import LeaseStore
from sage.llm.control_plane.store.rows import engine_event
from sage.llm.control_plane.store.tables import events

#: Key of PostgreSQL's advisory lock for new events. The lock ensures that ids increase in the order of commits.
_FEED_LOCK = 0x53414745_00000002


class FeedStore(LeaseStore):
    """The methods of the store for events."""

    def events(self, after: int = 0, *, limit: int, engine_id: str | None = None) -> list[EngineEvent]:
        """Return at most `limit` events with ids above `after`, oldest first.

        Events become visible in the order of their ids, so a reader that continues after the last known id misses no
        event.
        """
        query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
        if engine_id is not None:
            query = query.where(events.c.engine_id == engine_id)
        with self._read() as connection:
            return [engine_event(row) for row in connection.execute(query)]

    def last_event(self) -> int:
        """Return the id of the newest event, or 0 if there are no events."""
        with self._read() as connection:
            return connection.scalar(select(func.max(events.c.id))) or 0

    @staticmethod
    def _event(
        connection: Connection,
        engine_id: str,
        kind: EventKind,
        actor: str,
        *,
        before: EngineState | None = None,
        after: EngineState | None = None,
        reason: str = "",
        route: str | None = None,
    ) -> int:
        """Append an event and return its id. On PostgreSQL, other transactions cannot append until this transaction ends."""
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_FEED_LOCK})"))
        row = {"engine_id": engine_id, "kind": kind, "at": clock(), "before": before, "after": after,
               "actor": actor, "reason": reason, "route": route}  # fmt: skip
        event_id: int = connection.execute(insert(events).values(row).returning(events.c.id)).scalar_one()
        return event_id
