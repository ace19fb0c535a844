"""Queries: everything the control plane asks of its database and tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, Engine, Result, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sage.common.errors import NotFound
from sage.common.processes import ProcessIdentity
from sage.llm.control_plane.states import SETTLED, EngineState, check_transition
from sage.llm.control_plane.store.tables import EngineRow, EventRow, LeaseRow
from sage.llm.control_plane.types import EngineEvent, EngineKind, Reason, Wanted

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

    @classmethod
    def of(cls, row: EngineRow) -> "EngineRecord":
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
        )

    @property
    def state_seconds(self) -> float:
        """How long it has been in its state."""
        return (datetime.now(UTC) - self.state_at).total_seconds()


class Store:
    """Engines, their events and the lease. Each method is one transaction."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def add(self, record: EngineRecord, actor: str) -> None:
        """Keep a new engine."""
        values = {**vars(record), "reason": None, "options": dict(record.options)}
        with Session(self._database) as session, session.begin():
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
        query = select(EngineRow).order_by(EngineRow.created_at)
        if active_only:
            query = query.where(EngineRow.state.not_in(SETTLED))
        with Session(self._database) as session:
            return [EngineRecord.of(row) for row in session.scalars(query)]

    def move(
        self, record: EngineRecord, state: EngineState, actor: str, reason: Reason | None = None, **values: Any
    ) -> EngineRecord:
        """Take an engine from the state it was read in to another, with its event, or raise StaleWrite.

        Raises IllegalTransition where the table of states does not have the step.
        """
        check_transition(record.state, state)
        told = reason.model_dump() if reason else None
        with Session(self._database) as session, session.begin():
            self._write(session, record, state=state, reason=told, state_at=datetime.now(UTC), **values)
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

    def hold_lease(self, token: str, node: str, me: ProcessIdentity) -> bool:
        """Take or renew the right to reconcile; False where another living control plane has it.

        A holder on this node whose process is gone is not waited for.
        """
        now = datetime.now(UTC)
        mine = {
            "token": token, "node": node, "pid": me.pid, "pid_start_time": me.start_time,
            "expires_at": now + timedelta(seconds=LEASE_SECONDS),
        }  # fmt: skip
        try:
            with Session(self._database) as session, session.begin():
                row = session.get(LeaseRow, _LEASE, with_for_update=True)
                if row is None:
                    session.add(LeaseRow(name=_LEASE, **mine))
                    return True
                other = ProcessIdentity(row.pid, row.pid_start_time)
                is_dead = row.node == node and other.process() is None
                if row.token != token and not is_dead and _aware(row.expires_at) > now:
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
    def _write(session: Session, record: EngineRecord, **values: Any) -> None:
        written = session.execute(
            update(EngineRow)
            .where(EngineRow.id == record.id, EngineRow.version == record.version)
            .values(version=record.version + 1, **values)
        )
        if not _wrote(written):
            raise StaleWrite(record.id)


def _wrote(result: Result[Any]) -> bool:
    return bool(cast("CursorResult[Any]", result).rowcount)


def _event(engine_id: str, before: EngineState | None, after: EngineState, actor: str, reason: str) -> EventRow:
    return EventRow(engine_id=engine_id, at=datetime.now(UTC), before=before, after=after, actor=actor, reason=reason)


def _aware(moment: datetime) -> datetime:
    """SQLite forgets the zone; all we write is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
