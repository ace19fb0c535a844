"""Convert records to rows of the database, and rows to records."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from sage.llm.client.types import (
    DesiredState,
    EngineEvent,
    EngineKind,
    EngineState,
    EventKind,
    OnBusy,
    Reason,
    RestartPolicy,
)
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState


def to_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record as values of columns."""
    return {name: _to_column(value) for name, value in values.items()}


def _to_column(value: Any) -> Any:
    match value:
        case Reason():
            return value.model_dump()
        case Mapping():
            return dict(value)
        case tuple():
            return list(value)
        case _:
            return value


def engine_record(row: Row[Any] | Mapping[str, Any]) -> EngineRecord:
    """Return the EngineRecord of a row of `engines`."""
    values: dict[str, Any] = dict(row if isinstance(row, Mapping) else row._mapping)  # noqa: SLF001 - public in SQLAlchemy
    values["kind"] = EngineKind(values["kind"])
    values["state"] = EngineState(values["state"])
    values["desired"] = DesiredState(values["desired"])
    values["restart_policy"] = RestartPolicy(values["restart_policy"])
    values["reason"] = Reason(**values["reason"]) if values["reason"] else None
    values["devices"] = _devices(values["devices"])
    values["created_at"] = in_utc(values["created_at"])
    values["state_at"] = in_utc(values["state_at"])
    values["on_busy"] = OnBusy(values["on_busy"])
    values["not_before"] = values["not_before"] and in_utc(values["not_before"])
    values["last_request_at"] = values["last_request_at"] and in_utc(values["last_request_at"])
    return EngineRecord(**values)


def server_record(row: Row[Any]) -> ServerRecord:
    """Return the ServerRecord of a row of `servers`."""
    values: dict[str, Any] = dict(row._mapping)  # noqa: SLF001 - public in SQLAlchemy
    values["state"] = ServerState(values["state"])
    values["devices"] = _devices(values["devices"])
    values["created_at"] = in_utc(values["created_at"])
    return ServerRecord(**values)


def engine_event(row: Row[Any]) -> EngineEvent:
    """Return the EngineEvent of a row of `engine_events`."""
    values: dict[str, Any] = dict(row._mapping)  # noqa: SLF001 - public in SQLAlchemy
    values["kind"] = EventKind(values["kind"])
    values["at"] = in_utc(values["at"])
    return EngineEvent(**values)


def _devices(value: list[str] | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)


def in_utc(moment: datetime) -> datetime:
    """Return a time in UTC.

    SQLite returns times in UTC, but without a time zone. PostgreSQL returns times in the time zone of the session.
    """
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
