"""Read and write engines, servers and the change feed in the database of the control plane."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from sage.common.errors import Conflict, NotFound
from sage.llm.client.types import DesiredState, EngineKind, EngineState, EventKind, Reason
from sage.llm.control_plane.states import check_transition
from sage.llm.control_plane.store.clock import clock
from sage.llm.control_plane.store.leases import LEASE_SECONDS, LeaseLost, StaleWrite
from sage.llm.control_plane.store.outbox import OutboxStore
from sage.llm.control_plane.store.pages import page_query, position
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord
from sage.llm.control_plane.store.routes import RouteStore
from sage.llm.control_plane.store.rows import engine_record, server_record, to_columns
from sage.llm.control_plane.store.servers import ServerStore
from sage.llm.control_plane.store.tables import ACTIVE, engines, events, servers
from sage.llm.control_plane.store.transitions import TransitionCounts

#: Columns of an engine that describe the engine's server. Some of these columns describe how the server loads the model.
_OF_SERVER = (
    "server_id", "backend", "backend_reason", "options", "dedicated", "base", "base_version", "adapter", "served_as",
    "devices", "threads", "reserved_bytes", "least_bytes",
)  # fmt: skip

__all__ = ["LEASE_SECONDS", "LeaseLost", "StaleWrite", "Store", "port_taken"]


class Store(ServerStore, RouteStore, OutboxStore):
    """The database of the control plane. The methods block, so call them in a thread.

    Each method that has a parameter `lease` raises LeaseLost if the lease is no longer valid.
    """

    def __init__(self, database: Engine, lease_seconds: float = LEASE_SECONDS) -> None:
        super().__init__(database, lease_seconds)
        self.transitions = TransitionCounts()

    def add(
        self,
        record: EngineRecord,
        actor: str,
        lease: Lease,
        notes: tuple[EngineRecord, Mapping[str, Any]] | None = None,
        replaces: EngineRecord | None = None,
    ) -> EngineRecord:
        """Insert a new engine and set its times, version and event ids. Raises Conflict if its port is taken.

        notes: another engine, and new values for the columns of that engine.  replaces: an engine to stop.
        These engines are changed in the transaction that inserts the new engine. Raises StaleWrite if one of these
        engines was changed after its record was read.
        """
        values = to_columns(vars(record)) | {"version": 1, "created_at": clock(), "state_at": clock()}
        with _one_engine_a_port(record), self._fenced(lease, record.node) as connection:
            event = self._event(connection, record.id, EventKind.CREATED, actor, after=record.state)
            values |= {"first_event": event, "last_event": event}
            if notes:
                other, columns = notes
                self._event(connection, other.id, EventKind.UPDATED, actor)
                self._update(connection, other, columns)
            if replaces:
                self._set_desired(connection, replaces, DesiredState.STOPPED, actor)
            return engine_record(connection.execute(insert(engines).values(values).returning(engines)).one())

    def transition(
        self,
        record: EngineRecord,
        state: EngineState,
        *,
        actor: str,
        lease: Lease,
        reason: Reason | None = None,
        put_server: ServerRecord | None = None,
        join_server: str | None = None,
        join_values: Mapping[str, Any] | None = None,
        leave_server: str | None = None,
        must_remain: bool = False,
        **values: Any,
    ) -> EngineRecord:
        """Change the state of the engine `record` to `state`, and write the event and the server in the same transaction.

        put_server: server to insert or replace.
        join_server: id of the server that the engine joins. This server hosts other engines, or sleeps.
        join_values: new values for columns of the server to join. With `join_values`, this server must be asleep.
        leave_server: id of the server that the engine leaves. When the last engine leaves, the server's row is removed,
        unless the server sleeps.
        must_remain: whether to raise StaleWrite if no other engine would remain on the server.
        values: new values for other columns of the engine.

        Raises StaleWrite if the engine was changed after it was read, or if the server to replace hosts other engines.
        Raises StaleWrite if the server to join is closing, no longer exists, or sleeps although there are no `join_values`.
        Raises StaleWrite if there are `join_values` although the server does not sleep.
        Raises IllegalTransition if the transition is not legal. Raises Conflict if another active engine has the engine's
        port.
        """
        with _one_engine_a_port(record), self._fenced(lease, record.node) as connection:
            if leave_server:
                self._leave(connection, record, leave_server, must_remain=must_remain)
            if put_server:
                self._put(connection, record, put_server)
            if join_server:
                self._join(connection, record, join_server, join_values or {})
                values["server_id"] = join_server
            return self._move(connection, record, state, actor, reason, **values)

    def restart(
        self,
        record: EngineRecord,
        *,
        actor: str,
        lease: Lease,
        reason: Reason | None,
        leave_server: str | None,
        must_remain: bool = False,
        restarts: int,
        **values: Any,
    ) -> EngineRecord:
        """Mark an engine as failed and queue it again, with two events in one transaction.

        restarts: new value of the column `restarts`. Raises the same errors as `transition`.
        """
        with _one_engine_a_port(record), self._fenced(lease, record.node) as connection:
            if leave_server:
                self._leave(connection, record, leave_server, must_remain=must_remain)
            failed = self._move(connection, record, EngineState.FAILED, actor, reason, restarts=restarts, **values)
            return self._move(connection, failed, EngineState.QUEUED, actor, reason)

    def set_desired(
        self, record: EngineRecord, desired: DesiredState, *, force: bool, actor: str, lease: Lease, **values: Any
    ) -> EngineRecord:
        """Write the desired state and other columns of an engine, and add an event. Raises StaleWrite."""
        with self._fenced(lease, record.node) as connection:
            return self._set_desired(connection, record, desired, actor, force=force, **values)

    def revise(self, record: EngineRecord, *, actor: str, lease: Lease, **values: Any) -> EngineRecord:
        """Write columns of an engine and add an event. Raises StaleWrite."""
        with self._fenced(lease, record.node) as connection:
            self._event(connection, record.id, EventKind.UPDATED, actor)
            return self._update(connection, record, values)

    def swap_servers(
        self, record: EngineRecord, merger: EngineRecord, *, actor: str, lease: Lease, form: str
    ) -> tuple[EngineRecord, EngineRecord]:
        """Swap the servers of two engines, with all columns that describe the servers, and stop the engine `merger`.

        form: new value of the column `form` of `record`. Raises StaleWrite if either engine was changed after it was read.
        """
        new, old = ({name: getattr(engine, name) for name in _OF_SERVER} for engine in (merger, record))
        with self._fenced(lease, record.node) as connection:
            self._event(connection, record.id, EventKind.UPDATED, actor)
            return (
                self._update(connection, record, {**new, "form": form, "merger_id": None}),
                self._set_desired(connection, merger, DesiredState.STOPPED, actor, **old, form=None),
            )

    def touch(self, engine_id: str) -> EngineRecord:
        """Store the time of a request to an engine, and return the engine. Raises NotFound.

        This method needs no lease, so a control plane on standby can call it. The engine's version is incremented.
        Therefore an attempt to store a pause that was planned before the request raises StaleWrite.
        """
        query = update(engines).where(engines.c.id == engine_id)
        touched = query.values(last_request_at=clock(), version=engines.c.version + 1).returning(engines)
        with self._write() as connection:
            row = connection.execute(touched).one_or_none()
        return engine_record(row) if row else self.get(engine_id)

    def remove(self, record: EngineRecord, *, actor: str, lease: Lease) -> None:
        """Delete an engine and its events, except the event of the removal. Raises StaleWrite."""
        with self._fenced(lease, record.node) as connection:
            event = self._event(connection, record.id, EventKind.REMOVED, actor, before=record.state)
            if not connection.execute(delete(engines).where(_as_read(record))).rowcount:
                raise StaleWrite(record.id)
            connection.execute(delete(events).where(events.c.engine_id == record.id, events.c.id < event))

    def get(self, engine_id: str) -> EngineRecord:
        """Return an engine. Raises NotFound."""
        with self._read() as connection:
            row = connection.execute(select(engines).where(engines.c.id == engine_id)).one_or_none()
        if row is None:
            raise NotFound(
                code="engine_not_found",
                message=f"No engine '{engine_id}'.",
                hint="`sage llm engine list --all` shows all engines.",
                param="engine_id",
            )
        return engine_record(row)

    def page(
        self,
        *,
        limit: int,
        after: str | None = None,
        states: Collection[EngineState] | None = None,
        kinds: Collection[EngineKind] | None = None,
        node: str | None = None,
        newest_first: bool = False,
    ) -> tuple[list[EngineRecord], bool]:
        """Return at most `limit` engines, oldest or newest first, and whether more engines follow.

        after: the id of the last engine of the previous page. Raises ConfigError if this engine does not exist.
        """
        with self._read() as connection:
            behind = position(connection, after) if after else None
            query = page_query(limit + 1, behind, states, kinds, node, newest_first)
            found = [engine_record(row) for row in connection.execute(query)]
        return found[:limit], len(found) > limit

    def active(self, node: str) -> list[EngineRecord]:
        """Return the engines of a node that are not stopped, completed or failed, oldest first."""
        query = select(engines).where(engines.c.node == node, ACTIVE).order_by(engines.c.first_event)
        with self._read() as connection:
            return [engine_record(row) for row in connection.execute(query)]

    def hosted(self, engine_ids: Collection[str]) -> list[tuple[EngineRecord, ServerRecord | None]]:
        """Return the engines whose ids are in `engine_ids`, each with its server (None if the engine has no server)."""
        with self._read() as connection:
            found = [engine_record(row) for row in connection.execute(select(engines).where(engines.c.id.in_(engine_ids)))]
            ids = {engine.server_id for engine in found}
            rows = connection.execute(select(servers).where(servers.c.id.in_(ids)))
            by_id: Mapping[str | None, ServerRecord] = {row.id: server_record(row) for row in rows}
        return [(engine, by_id.get(engine.server_id)) for engine in found]

    def count(self) -> Mapping[tuple[EngineKind, EngineState], int]:
        """Return the number of engines of each kind in each state, over all nodes."""
        query = select(engines.c.kind, engines.c.state, func.count()).group_by(engines.c.state, engines.c.kind)
        with self._read() as connection:
            return {(EngineKind(kind), EngineState(state)): number for kind, state, number in connection.execute(query)}

    def _set_desired(
        self, connection: Connection, record: EngineRecord, desired: DesiredState, actor: str, *, force: bool = False,
        **values: Any,
    ) -> EngineRecord:  # fmt: skip
        self._event(connection, record.id, EventKind.DESIRED, actor, reason=f"{desired}{' by force' if force else ''}")
        return self._update(connection, record, {"desired": desired, "force": force, **values})

    def _move(
        self,
        connection: Connection,
        record: EngineRecord,
        state: EngineState,
        actor: str,
        reason: Reason | None,
        **values: Any,
    ) -> EngineRecord:
        check_transition(record.state, state)
        message = reason.message if reason else ""
        event = self._event(
            connection, record.id, EventKind.TRANSITION, actor, before=record.state, after=state, reason=message
        )
        moved = self._update(
            connection, record, {**values, "state": state, "reason": reason}, state_at=clock(), last_event=event
        )
        self._announce(connection, moved)
        self.transitions.add(record, moved)
        return moved

    @staticmethod
    def _update(connection: Connection, record: EngineRecord, values: Mapping[str, Any], **more: Any) -> EngineRecord:
        query = update(engines).where(_as_read(record))
        changed = query.values(version=record.version + 1, **to_columns(values), **more).returning(engines)
        row = connection.execute(changed).one_or_none()
        if row is None:
            raise StaleWrite(record.id)
        return engine_record(row)


def _as_read(record: EngineRecord) -> ColumnElement[bool]:
    return and_(engines.c.id == record.id, engines.c.node == record.node, engines.c.version == record.version)


@contextlib.contextmanager
def _one_engine_a_port(record: EngineRecord) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        if "ix_engines_active_port" in str(error.orig) or "engines.requested_port" in str(error.orig):
            raise port_taken(record.requested_port, "another engine uses it") from None
        raise


def port_taken(port: int | None, why: str) -> Conflict:
    """Return the error to raise if a port cannot be used."""
    return Conflict(
        code="port_taken",
        message=f"Port {port} cannot be used: {why}.",
        hint="Use another --port, or omit --port to use a free port.",
        param="port",
    )
