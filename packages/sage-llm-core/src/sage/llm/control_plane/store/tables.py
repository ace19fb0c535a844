"""The tables. A change here needs a migration in `migrations/versions/`."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, DateTime, ForeignKey, Index, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_ACTIVE = text("state NOT IN ('stopped', 'completed', 'failed')")


class Base(DeclarativeBase):
    """The schema."""


class EngineRow(Base):
    """One engine."""

    __tablename__ = "engines"
    #: No two engines that something may happen to were promised one port.
    __table_args__ = (
        Index("ix_engines_active_port", "requested_port", unique=True, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text, index=True)
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    wanted: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    reason: Mapped[dict[str, str] | None] = mapped_column(JSON)
    node: Mapped[str]
    port: Mapped[int | None]
    requested_port: Mapped[int | None]
    #: Raised by every write; a write that read an older one changes nothing.
    version: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    state_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class EventRow(Base):
    """One transition of one engine."""

    __tablename__ = "engine_events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    engine_id: Mapped[str] = mapped_column(ForeignKey("engines.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    before: Mapped[str | None]
    after: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str] = mapped_column(Text)


class OwnerRow(Base):
    """The one node whose engines these are."""

    __tablename__ = "owner"

    slot: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  #: always 0
    node: Mapped[str]


class LeaseRow(Base):
    """Who may reconcile."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    pid_started: Mapped[str]
    #: Counts for another host's process only: whether one of this host lives can be seen.
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
