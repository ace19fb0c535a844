"""`python -m sage.llm.control_plane.store.check`: check the database without changing it, and print the result as JSON."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, func, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from sage.common.settings import load_settings
from sage.llm.control_plane.store.database import REVISIONS, cause, parse_url, shown
from sage.llm.control_plane.store.tables import events

_CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Report:
    """The state of a database."""

    name: str  #: the URL without user and password, or the path of the SQLite file
    fault: str = ""  #: why the database cannot be used; "": no fault
    exists: bool = True
    revision: str | None = None  #: None: the database is empty, does not exist, or cannot be used
    newest_revision: str = REVISIONS[-1]
    #: Seconds by which the clock of the database server is ahead of the clock of this machine; 0 for SQLite.
    server_ahead_seconds: float = 0.0
    #: Seconds from the current time of the database server (SQLite: of this machine) to the time of the newest event.
    #: A positive value means that the newest event seems to be in the future.
    newest_event_ahead_seconds: float = 0.0


def check(url: str) -> Report:
    """Connect to a database and return its state. Raises ConfigError if the URL is wrong."""
    parsed = parse_url(url)
    name = shown(parsed)
    if parsed.get_backend_name() == "sqlite":
        name = parsed.database or ":memory:"
        if not Path(name).exists():
            return Report(name, exists=False)
    try:
        database = _read_only(parsed)
        with database.connect() as connection:
            return _inspected(connection, name)
    except (SQLAlchemyError, OSError, ImportError, TypeError, ValueError) as error:
        return Report(name, fault=cause(error, parsed))


def _read_only(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        path = quote(str(Path(url.database or "").absolute()))
        return create_engine(f"sqlite:///file:{path}?mode=ro&uri=true", connect_args={"timeout": _CONNECT_SECONDS})
    return create_engine(url, hide_parameters=True, connect_args={"connect_timeout": _CONNECT_SECONDS})


def _inspected(connection: Connection, name: str) -> Report:
    server_ahead_seconds = 0.0
    if connection.dialect.name == "sqlite":
        answer = connection.execute(text("PRAGMA quick_check(1)")).scalar()
        if answer != "ok":
            return Report(name, fault=f"it is damaged: {answer}")
    else:
        now: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        server_ahead_seconds = now.timestamp() - time.time()
    if not inspect(connection).has_table("alembic_version"):
        return Report(name, server_ahead_seconds=server_ahead_seconds)
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    newest = connection.execute(select(func.max(events.c.at))).scalar() if revision == REVISIONS[-1] else None
    ahead_seconds = (newest.replace(tzinfo=newest.tzinfo or UTC).timestamp() - time.time()) if newest else 0.0
    return Report(
        name,
        revision=revision,
        server_ahead_seconds=server_ahead_seconds,
        newest_event_ahead_seconds=ahead_seconds - server_ahead_seconds,
    )


def main() -> int:
    """Check the database that is configured in the settings, and print the report as JSON."""
    json.dump(asdict(check(load_settings().store_url)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
