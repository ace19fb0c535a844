"""The database's clock in SQL, which all control planes that share the database use."""

from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class clock(FunctionElement[datetime]):  # noqa: N801 - named as SQL functions are
    """The current time of the database, plus some seconds."""

    type = DateTime(timezone=True)
    inherit_cache = True

    def __init__(self, plus_seconds: float = 0.0) -> None:
        super().__init__(literal(float(plus_seconds)))


@compiles(clock, "sqlite")
def _sqlite(element: clock, compiler: Any, **options: Any) -> str:
    """Format the time as SQLAlchemy does, with six decimal places of the seconds."""
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({compiler.process(element.clauses, **options)}) || ' seconds')"


@compiles(clock, "postgresql")
def _postgresql(element: clock, compiler: Any, **options: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"
