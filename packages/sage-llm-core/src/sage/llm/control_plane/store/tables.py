"""The tables. A change here needs a migration in `migrations/versions/`."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, DateTime, ForeignKey, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The schema."""


class EngineRow(Base):
    """One engine."""

    __tablename__ = "engines"

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


class LeaseRow(Base):
    """Who may reconcile."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[str]
    node: Mapped[str]
    pid: Mapped[int]
    pid_start_time: Mapped[float]
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
