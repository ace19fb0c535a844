"""Open the database: connection settings and migrations."""

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from sage.common.errors import ConfigError
from sage.common.paths import private_file
from sage.llm.control_plane.store.clock import add_uptime

_MIGRATIONS = Path(__file__).parent / "migrations"
#: The revisions of the schema, oldest first. A revision is the prefix of a migration's file name.
REVISIONS = sorted(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("0*.py"))
#: Key of PostgreSQL's advisory lock for migrations.
_MIGRATION_LOCK = 0x53414745_00000001
_HINT = "Correct SAGE_DATABASE_URL, or unset it to use SQLite in the state folder."
_FILE_HINT = (
    "Restore the file from a backup, move it away to begin with an empty database, or set SAGE_DATABASE_URL to another "
    "database."
)
_DRIVER_HINT = "Install the driver: `pip install 'sage-llm-core[postgresql]'`."


def open_database(url: str) -> Engine:
    """Open a database, bring its schema up to date, and return its SQLAlchemy engine.

    An SQLite file can be read only by its owner, and each commit is written to the disk at once. Raises ConfigError if the
    URL is wrong, the database is unreachable, or its schema is newer than this version of SAGE. The error message does not
    contain the password.
    """
    parsed = parse_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    try:
        database = _open_sqlite(parsed) if is_sqlite else _open_postgresql(parsed)
        _migrate(database, shown(parsed))
    except (SQLAlchemyError, OSError, ImportError, TypeError, ValueError) as error:
        message = f"The database {shown(parsed)} cannot be opened: {cause(error, parsed)}."
        hint = _DRIVER_HINT if isinstance(error, ImportError) else _FILE_HINT if is_sqlite else _HINT
        raise ConfigError(code="database_unusable", message=message, hint=hint) from None
    return database


def parse_url(url: str) -> URL:
    """Parse a database URL. The default driver for PostgreSQL is psycopg. Raises ConfigError if SAGE cannot use the URL."""
    message = "SAGE_DATABASE_URL is not a SQLAlchemy URL (dialect://user:password@host/database)."
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() in ("sqlite", "postgresql"):
            return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed
        message = f"SAGE_DATABASE_URL: {parsed.drivername} is not supported; use sqlite or postgresql."
    except (SQLAlchemyError, ValueError):
        pass
    raise ConfigError(code="database_unusable", message=message, hint=_HINT)


def _open_sqlite(url: URL) -> Engine:
    if url.database and not url.database.startswith((":memory:", "file:")):
        private_file(Path(url.database))
    database = create_engine(url, hide_parameters=True)
    event.listen(database, "connect", _configure_sqlite)
    event.listen(database, "begin", _begin_sqlite)
    return database


def _open_postgresql(url: URL) -> Engine:
    database = create_engine(url, pool_pre_ping=True, hide_parameters=True)
    event.listen(database, "connect", _configure_postgresql)
    return database


def shown(url: URL) -> str:
    """Return the URL as text for messages, without user, password and options."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()


def cause(error: Exception, url: URL) -> str:
    """Return the first line of a database driver's error. The password and the option values of the URL are hidden."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0].rstrip(".")
    for secret in (url.password, *(value for values in url.normalized_query.values() for value in values)):
        first = first.replace(str(secret), "***") if secret else first
    return first


def _configure_sqlite(connection: Any, _: object) -> None:
    add_uptime(connection)
    connection.isolation_level = None  # prevents the driver from starting transactions
    cursor = connection.cursor()
    for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction. If the transaction writes, it locks the database, so that no other transaction can write."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _configure_postgresql(connection: Any, _: object) -> None:
    """Limit the time for which a suspended control plane holds locks, and the time that a control plane waits for a lock."""
    with connection.cursor() as cursor:
        cursor.execute("SET idle_in_transaction_session_timeout = '3s'")
        cursor.execute("SET lock_timeout = '5s'")
    connection.commit()


def _migrate(database: Engine, name: str) -> None:
    with database.connect() as connection:
        revision = _known_revision(connection, name)
    if revision == REVISIONS[-1]:  # the usual case: return before the slow import of Alembic
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with database.execution_options(writes=True).begin() as connection:  # one transaction for all migrations
        if database.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        if _known_revision(connection, name) != REVISIONS[-1]:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _known_revision(connection: Connection, name: str) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if revision is not None and revision not in REVISIONS:
        raise ConfigError(
            code="database_newer",
            message=f"The database {name} has schema {revision}; "
            f"this version of SAGE supports at most schema {REVISIONS[-1]}.",
            hint="Upgrade SAGE, or set SAGE_DATABASE_URL to another database.",
        )
    return revision
