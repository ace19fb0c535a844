"""Servers in the database, and the engines that each server hosts.

Each method that changes the engines of a server first locks the row of the server. Therefore an engine cannot join a server
while the last engine leaves. If two engines leave a server at the same time, exactly one of them is the last engine.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update

from sage.llm.client.types import EngineState
from sage.llm.control_plane.store.clock import clock
from sage.llm.control_plane.store.leases import LeaseStore, StaleWrite
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord, ServerState
from sage.llm.control_plane.store.rows import server_record, to_columns
from sage.llm.control_plane.store.tables import engines, servers

#: The states in which a server hosts an engine.
HOSTED = frozenset({EngineState.STARTING, EngineState.RUNNING, EngineState.STOPPING})


class ServerStore(LeaseStore):
    """The methods of the store for servers."""

    def servers(self, node: str) -> list[ServerRecord]:
        """Return the servers of a node."""
        with self._read() as connection:
            return [server_record(row) for row in connection.execute(select(servers).where(servers.c.node == node))]

    def is_server_needed(self, server_id: str, engine_id: str) -> bool:
        """Return whether the server has a row in the database, or an engine other than `engine_id` refers to the server."""
        others = select(engines.c.id).where(engines.c.server_id == server_id, engines.c.id != engine_id).limit(1)
        with self._read() as connection:
            row = connection.execute(select(servers.c.id).where(servers.c.id == server_id)).first()
            return row is not None or connection.execute(others).first() is not None

    def update_server(self, server: ServerRecord, *, lease: Lease, **values: Any) -> ServerRecord:
        """Change columns of a server. Raises StaleWrite if the server was changed or removed after it was read."""
        with self._fenced(lease, server.node) as connection:
            return self._update_server(connection, server, **values)

    def close_server(
        self,
        server: ServerRecord,
        engine: EngineRecord,
        *,
        lease: Lease,
        state: ServerState = ServerState.CLOSING,
    ) -> ServerRecord:
        """Store the state `closing` or `sleeping`. No engine can join a server that is closing.

        Raises StaleWrite if the server hosts an engine other than `engine`, or if the server was changed or removed after it
        was read.
        """
        with self._fenced(lease, server.node) as connection:
            closed = self._update_server(connection, server, state=state)
            if self._hosts_others(connection, server.id, engine):
                raise StaleWrite(server.id)
            return closed

    def remove_server(self, server: ServerRecord, *, lease: Lease) -> None:
        """Delete the row of a server. Raises StaleWrite if the server was changed or removed after it was read."""
        with self._fenced(lease, server.node) as connection:
            if not connection.execute(delete(servers).where(_as_read(server))).rowcount:
                raise StaleWrite(server.id)

    def _put(self, connection: Connection, engine: EngineRecord, server: ServerRecord) -> None:
        if self._hosts_others(connection, server.id, engine):
            raise StaleWrite(server.id)
        connection.execute(delete(servers).where(_is(server.id, engine.node)))
        connection.execute(insert(servers).values(to_columns(vars(server)) | {"created_at": clock()}))

    @staticmethod
    def _join(connection: Connection, engine: EngineRecord, server_id: str, values: Mapping[str, Any]) -> None:
        """Join a server.

        If `values` is empty, the server must be neither asleep nor closing.
        If `values` is not empty, the server must be asleep, and `values` is stored in the server's row.
        """
        state = servers.c.state
        fits = state == ServerState.SLEEPING if values else state.not_in([ServerState.SLEEPING, ServerState.CLOSING])
        changed = {"version": servers.c.version + (1 if values else 0), **to_columns(values)}
        if not connection.execute(update(servers).where(_is(server_id, engine.node), fits).values(changed)).rowcount:
            raise StaleWrite(server_id)

    def _leave(self, connection: Connection, engine: EngineRecord, server_id: str, *, must_remain: bool) -> None:
        is_it = _is(server_id, engine.node)
        connection.execute(update(servers).where(is_it).values(version=servers.c.version))  # lock the row
        if self._hosts_others(connection, server_id, engine):
            return
        if must_remain:
            raise StaleWrite(server_id)
        connection.execute(delete(servers).where(is_it, servers.c.state != ServerState.SLEEPING))

    @staticmethod
    def _update_server(connection: Connection, server: ServerRecord, **values: Any) -> ServerRecord:
        query = update(servers).where(_as_read(server))
        changed = query.values(version=server.version + 1, **to_columns(values)).returning(servers)
        row = connection.execute(changed).one_or_none()
        if row is None:
            raise StaleWrite(server.id)
        return server_record(row)

    @staticmethod
    def _hosts_others(connection: Connection, server_id: str, engine: EngineRecord) -> bool:
        others = (engines.c.server_id == server_id, engines.c.id != engine.id, engines.c.state.in_(HOSTED))
        return bool(connection.scalar(select(func.count()).select_from(engines).where(*others)))


def _as_read(server: ServerRecord) -> ColumnElement[bool]:
    return and_(_is(server.id, server.node), servers.c.version == server.version)


def _is(server_id: str, node: str) -> ColumnElement[bool]:
    return and_(servers.c.id == server_id, servers.c.node == node)
