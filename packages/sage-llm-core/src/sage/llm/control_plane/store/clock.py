"""SQL clocks that all control planes of a database share: one clock for timestamps, and one clock for leases.

A lease must not end earlier or later if somebody sets the machine's clock. On SQLite, the lease clock is therefore the time
since the machine was booted. On PostgreSQL, the lease clock is the clock of the database server.
"""

import time
from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

#: A clock that nobody can set. If the system has CLOCK_BOOTTIME, the time while the machine is suspended is also counted.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class clock(FunctionElement[datetime]):  # noqa: N801 - lower case, like SQL functions
    """The current time of the database."""

    type = DateTime(timezone=True)
    inherit_cache = True


class lease_clock(FunctionElement[datetime]):  # noqa: N801
    """The current time of the lease clock plus `plus_seconds`."""

    type = DateTime(timezone=True)
    inherit_cache = True

    def __init__(self, plus_seconds: float = 0.0) -> None:
        super().__init__(literal(float(plus_seconds)))


def uptime_seconds() -> float:
    """Return the time of this machine's lease clock (`_CLOCK`) in seconds."""
    return time.clock_gettime(_CLOCK)


def add_uptime(connection: Any) -> None:
    """Define the SQL function `uptime_seconds()` for a connection to SQLite."""
    connection.create_function("uptime_seconds", 0, uptime_seconds)


@compiles(clock, "sqlite")
def _sqlite(*_: Any, **__: Any) -> str:
    """Return SQL for the current time in SQLAlchemy's format, which has six decimal places for the seconds."""
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(clock, "postgresql")
def _postgresql(*_: Any, **__: Any) -> str:
    return "clock_timestamp()"


@compiles(lease_clock, "sqlite")
def _sqlite_lease(element: lease_clock, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"strftime('%Y-%m-%d %H:%M:%f000', uptime_seconds() + {seconds}, 'unixepoch')"


@compiles(lease_clock, "postgresql")
def _postgresql_lease(element: lease_clock, compiler: Any, **options: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"
