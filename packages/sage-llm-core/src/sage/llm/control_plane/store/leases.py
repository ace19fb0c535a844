"""Leases. A lease is the right to write the rows of a node.

Each takeover of a lease increments a number, the fence. A write with an outdated fence is refused. For example, a control
plane that was suspended cannot write if another control plane has taken over the lease in the meantime.

If a control plane is suspended in a transaction, a takeover waits for the end of the transaction. PostgreSQL ends the
transaction after 3 s. SQLite cannot end the transaction, so nobody can write until the suspended process continues or exits.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from sqlalchemy import ColumnElement, Connection, Engine, and_, select, update
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite

from sage.common.identity import ProcessIdentity
from sage.llm.control_plane.store.clock import lease_clock
from sage.llm.control_plane.store.records import LeaderInfo, Lease
from sage.llm.control_plane.store.tables import NEVER_HELD, leases, nodes

LEASE_SECONDS = 8.0


class StaleWrite(Exception):
    """The row was changed after it was read. Nothing was written. The caller must read the row and decide again."""


class LeaseLost(StaleWrite):
    """The lease has expired, or another control plane has taken it over. Nothing was written."""


class LeaseStore:
    """Nodes and their leases."""

    def __init__(self, database: Engine, lease_seconds: float = LEASE_SECONDS) -> None:
        self._database = database
        self._writer = database.execution_options(writes=True)
        self.lease_seconds = lease_seconds

    def register_node(self, node: str, host: str) -> None:
        """Insert a node and a lease that nobody holds, or update the host of an existing node."""
        insert = insert_sqlite if self._database.dialect.name == "sqlite" else insert_postgresql
        lease = {"fence": 0, "host": "", "pid": 0, "pid_started": "", "url": "", "expires_at": NEVER_HELD}
        with self._write() as connection:
            statement = insert(nodes).values(id=node, host=host)
            connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"host": host}))
            connection.execute(insert(leases).values(node=node, **lease).on_conflict_do_nothing())

    def acquire_lease(self, node: str, holder: str, host: str, me: ProcessIdentity, url: str = "") -> Lease | None:
        """Acquire the lease and increment its fence. Return None if another active control plane holds the lease.

        The lease of another control plane can be taken if the lease has expired, or if the process of the other control
        plane ran on this host and has exited.
        holder: random token of this control plane.  me: process of this control plane.  url: URL of the gateway.
        """
        with self._read() as connection:  # reads only, because a control plane on standby calls this method every second
            query = select(leases, _is_valid(self.lease_seconds).label("is_valid"))
            row = connection.execute(query.where(leases.c.node == node)).one()
        has_exited = row.host == host and not ProcessIdentity(row.pid, row.pid_started).is_alive()
        if row.holder not in (None, holder) and row.is_valid and not has_exited:
            return None
        taken = update(leases).where(leases.c.node == node, leases.c.fence == row.fence)
        if row.holder not in (None, holder) and not has_exited:  # check again, because the holder may have renewed the lease
            taken = taken.where(~_is_valid(self.lease_seconds))
        taken = taken.values(
            fence=row.fence + 1,
            holder=holder,
            host=host,
            pid=me.pid,
            pid_started=me.started,
            url=url,
            expires_at=lease_clock(self.lease_seconds),
        )
        with self._write() as connection:
            return Lease(node, row.fence + 1) if connection.execute(taken).rowcount else None

    def renew_lease(self, lease: Lease, holder: str) -> bool:
        """Extend the lease, even if the lease has expired. Return False if the lease was taken over or released."""
        renewed = (
            update(leases).where(_is_of(lease), leases.c.holder == holder).values(expires_at=lease_clock(self.lease_seconds))
        )
        with self._write() as connection:
            return bool(connection.execute(renewed).rowcount)

    def release_lease(self, lease: Lease) -> None:
        """Release the lease, so that another control plane can take it immediately."""
        with self._write() as connection:
            connection.execute(update(leases).where(_is_of(lease)).values(holder=None, expires_at=NEVER_HELD))

    def leader(self, node: str) -> LeaderInfo | None:
        """Return the holder of the lease of a node, or None if the lease is free or has expired."""
        with self._read() as connection:
            query = select(leases).where(leases.c.node == node, leases.c.holder.is_not(None), _is_valid(self.lease_seconds))
            row = connection.execute(query).one_or_none()
        return LeaderInfo(row.holder, row.host, row.pid, row.url) if row else None

    @contextlib.contextmanager
    def _fenced(self, lease: Lease, node: str) -> Iterator[Connection]:
        """Open a transaction during which nobody can take over the lease. Raises LeaseLost if the lease is not valid."""
        if lease.node != node:
            raise LeaseLost(f"the lease of the node {lease.node} does not allow writes for the node {node}")
        with self._write() as connection:
            self._check_lease(connection, lease)
            yield connection

    def _check_lease(self, connection: Connection, lease: Lease) -> None:
        """Raise LeaseLost if the lease is not valid. A valid lease cannot be taken over before this transaction ends."""
        query = select(leases.c.fence).where(_is_of(lease), _is_valid(self.lease_seconds)).with_for_update(read=True)
        if connection.execute(query).first() is None:
            raise LeaseLost(f"this process no longer holds the lease of the node {lease.node} (fence {lease.fence})")

    def _read(self) -> AbstractContextManager[Connection]:
        return self._database.begin()

    def _write(self) -> AbstractContextManager[Connection]:
        return self._writer.begin()


def _is_of(lease: Lease) -> ColumnElement[bool]:
    return and_(leases.c.node == lease.node, leases.c.fence == lease.fence)


def _is_valid(lease_seconds: float) -> ColumnElement[bool]:
    """Return the SQL condition for a lease that has not expired.

    A lease whose expiry is too far in the future is not valid. Such an expiry was written before the clock was set back, or
    before the last boot of the machine.
    """
    return and_(leases.c.expires_at > lease_clock(), leases.c.expires_at <= lease_clock(2 * lease_seconds))
