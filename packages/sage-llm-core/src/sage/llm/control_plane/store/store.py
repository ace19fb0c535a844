"""Queries: everything the control plane asks of its database and tells it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, Engine, Result, Select, delete, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sage.common.errors import ConfigError, Conflict, NotFound
from sage.common.identity import ProcessIdentity
from sage.llm.client.types import SETTLED, EngineEvent, EngineKind, EngineState, Reason, Wanted
from sage.llm.control_plane.states import check_transition
from sage.llm.control_plane.store.tables import EngineRow, EventRow, LeaseRow, OwnerRow

LEASE_SECONDS = 10.0
_LEASE = "reconciler"


class StaleWrite(Exception):
    """Someone else has written since; read again and decide anew."""


@dataclass(frozen=True)
class EngineRecord:
    """One engine as the store has it."""

    id: str
    kind: EngineKind
    model: str
    name: str
    options: Mapping[str, Any]
    wanted: Wanted
    state: EngineState
    reason: Reason | None
    node: str
    port: int | None
    requested_port: int | None
    version: int
    created_at: datetime
    state_at: datetime
    last_event: int = 0  #: orders engines by their last transition, whatever the clock says; 0 if it was not asked for

    @classmethod
    def of(cls, row: EngineRow, last_event: int = 0) -> "EngineRecord":
        """Return a row as a frozen value."""
        return cls(
            id=row.id,
            kind=EngineKind(row.kind),
            model=row.model,
            name=row.name,
            options=row.options,
            wanted=Wanted(row.wanted),
            state=EngineState(row.state),
            reason=Reason(**row.reason) if row.reason else None,
            node=row.node,
            port=row.port,
            requested_port=row.requested_port,
            version=row.version,
            created_at=_aware(row.created_at),
            state_at=_aware(row.state_at),
            last_event=last_event,
        )


class Store:
    """Engines, their events and the lease. Each method is one transaction."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def claim(self, node: str, hint: str) -> None:
        """Make the database this node's. Raises ConfigError with the hint if it is another one's."""
        try:
            with Session(self._database) as session, session.begin():
                if session.get(OwnerRow, 0) is None:
                    session.add(OwnerRow(slot=0, node=node))
                    session.execute(update(EngineRow).values(node=node))  # written when a node was a host's name
        except IntegrityError:  # two came first at once
            pass
        with Session(self._database) as session:
            owner = session.get_one(OwnerRow, 0).node
        if owner != node:
            raise ConfigError(
                code="database_in_use",
                message=f"The database belongs to another state folder ({owner}; this one is {node}).",
                hint=hint.format(owner=owner),
                param="database_url",
            )

    def add(self, record: EngineRecord, actor: str) -> None:
        """Keep a new engine. Raises Conflict if its port was promised to another one."""
        values = {**vars(record), "reason": None, "options": dict(record.options)}
        del values["last_event"]
        with _one_engine_a_port(record), Session(self._database) as session, session.begin():
            session.add(EngineRow(**values))
            session.flush()
            session.add(_event(record.id, None, record.state, actor, ""))

    def get(self, engine_id: str) -> EngineRecord:
        """Return an engine; raises NotFound."""
        with Session(self._database) as session:
            row = session.get(EngineRow, engine_id)
            if row is None:
                raise NotFound(
                    code="engine_not_found",
                    message=f"No engine '{engine_id}'.",
                    hint="`sage llm engine list` shows all engines.",
                    param="engine_id",
                )
            return EngineRecord.of(row)

    def list(self, *, active_only: bool = False) -> Sequence[EngineRecord]:
        """Return all engines, oldest first, or only those that something may happen to."""
        last = func.max(EventRow.id)
        query: Select[EngineRow, int] = select(EngineRow, last).join(EventRow).group_by(EngineRow.id)
        query = query.order_by(func.min(EventRow.id))  # not by time: clocks are set back
        if active_only:
            query = query.where(EngineRow.state.not_in(SETTLED))
        with Session(self._database) as session:
            return [EngineRecord.of(row, last_event) for row, last_event in session.execute(query)]

    def move(
        self,
        record: EngineRecord,
        state: EngineState,
        actor: str,
        reason: Reason | None = None,
        lease: str | None = None,
        **values: Any,
    ) -> EngineRecord:
        """Take an engine from the state it was read in to another, with its event, or raise StaleWrite.

        lease: write only if this lease is still held. Raises IllegalTransition if the table of states does not have the
        step, Conflict if the engine is queued again and its port was promised to another one meanwhile.
        """
        check_transition(record.state, state)
        told = reason.model_dump() if reason else None
        with _one_engine_a_port(record), Session(self._database) as session, session.begin():
            self._write(session, record, lease, state=state, reason=told, state_at=datetime.now(UTC), **values)
            session.add(_event(record.id, record.state, state, actor, reason.message if reason else ""))
        return self.get(record.id)

    def want(self, record: EngineRecord, wanted: Wanted) -> EngineRecord:
        """Write down what the user wants of an engine, or raise StaleWrite."""
        with Session(self._database) as session, session.begin():
            self._write(session, record, wanted=wanted)
        return self.get(record.id)

    def remove(self, record: EngineRecord) -> None:
        """Forget an engine and its events, or raise StaleWrite."""
        with Session(self._database) as session, session.begin():
            self._write(session, record)
            session.execute(delete(EventRow).where(EventRow.engine_id == record.id))
            session.execute(delete(EngineRow).where(EngineRow.id == record.id))

    def events(self, engine_id: str, after: int = 0) -> Sequence[EngineEvent]:
        """Return an engine's transitions behind the one of id `after`, oldest first."""
        query = select(EventRow).where(EventRow.engine_id == engine_id, EventRow.id > after).order_by(EventRow.id)
        with Session(self._database) as session:
            return [
                EngineEvent(
                    id=row.id,
                    engine_id=row.engine_id,
                    at=_aware(row.at),
                    before=EngineState(row.before) if row.before else None,
                    after=EngineState(row.after),
                    actor=row.actor,
                    reason=row.reason,
                )
                for row in session.scalars(query)
            ]

    def hold_lease(self, token: str, host: str, me: ProcessIdentity) -> bool:
        """Take or renew the right to reconcile; False if another living control plane has it.

        A holder on this host has it for as long as its process lives, one on another host until it no longer renews it.
        """
        now = datetime.now(UTC)
        mine = {
            "token": token, "host": host, "pid": me.pid, "pid_started": me.started,
            "expires_at": now + timedelta(seconds=LEASE_SECONDS),
        }  # fmt: skip
        try:
            with Session(self._database) as session, session.begin():
                row = session.get(LeaseRow, _LEASE, with_for_update=True)
                if row is None:
                    session.add(LeaseRow(name=_LEASE, **mine))
                    return True
                is_alive = (
                    ProcessIdentity(row.pid, row.pid_started).is_alive()
                    if row.host == host
                    else now < _aware(row.expires_at) < now + timedelta(seconds=2 * LEASE_SECONDS)  # else a clock was set
                )
                if row.token != token and is_alive:
                    return False
                taken = session.execute(
                    update(LeaseRow).where(LeaseRow.name == _LEASE, LeaseRow.token == row.token).values(**mine)
                )
                return _wrote(taken)
        except IntegrityError:  # two came first at once
            return False

    def release_lease(self, token: str) -> None:
        """Give the right back."""
        with Session(self._database) as session, session.begin():
            session.execute(delete(LeaseRow).where(LeaseRow.token == token))

    @staticmethod
    def _write(session: Session, record: EngineRecord, lease: str | None = None, **values: Any) -> None:
        query = update(EngineRow).where(EngineRow.id == record.id, EngineRow.version == record.version)
        if lease is not None:
            query = query.where(exists().where(LeaseRow.token == lease))
        if not _wrote(session.execute(query.values(version=record.version + 1, **values))):
            raise StaleWrite(record.id)


@contextlib.contextmanager
def _one_engine_a_port(record: EngineRecord) -> Iterator[None]:
    """Tell the database's refusal of a second engine with one port."""
    try:
        yield
    except IntegrityError as error:
        if "ix_engines_active_port" in str(error.orig) or "engines.requested_port" in str(error.orig):
            raise port_taken(record.requested_port, "another engine has it") from None
        raise


def port_taken(port: int | None, why: str) -> Conflict:
    """Return the refusal of a port."""
    return Conflict(
        code="port_taken",
        message=f"Port {port} cannot be used: {why}.",
        hint="Use another --port, or omit it for a free one.",
        param="port",
    )


def _wrote(result: Result[Any]) -> bool:
    return bool(cast("CursorResult[Any]", result).rowcount)


def _event(engine_id: str, before: EngineState | None, after: EngineState, actor: str, reason: str) -> EventRow:
    return EventRow(engine_id=engine_id, at=datetime.now(UTC), before=before, after=after, actor=actor, reason=reason)


def _aware(moment: datetime) -> datetime:
    """SQLite forgets the zone; all we write is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
