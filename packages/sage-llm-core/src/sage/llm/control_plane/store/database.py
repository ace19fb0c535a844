"""Opening the database: connection settings and migrations."""

from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError

from sage.common.errors import ConfigError
from sage.common.paths import private_file

#: The migrations in `migrations/versions/`, oldest first.
REVISIONS = ("0001", "0002")
_HINT = "Correct SAGE_DATABASE_URL, or unset it for SQLite in the state folder."


def open_database(url: str) -> Engine:
    """Return a connected engine whose schema is of today.

    SQLite is opened in WAL mode, synced at every commit, with foreign keys on; only its user can read the file.
    Raises ConfigError, which tells no password, if the URL is wrong, or the database cannot be reached or is newer.
    """
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        message = "SAGE_DATABASE_URL is not a SQLAlchemy URL (dialect://user:password@host/database)."
        raise ConfigError(code="database_unusable", message=message, hint=_HINT) from None
    try:
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and parsed.database and not parsed.database.startswith((":memory:", "file:")):
            private_file(Path(parsed.database))
        database = create_engine(parsed, pool_pre_ping=not is_sqlite, hide_parameters=True)
        if is_sqlite:
            event.listen(database, "connect", _configure_sqlite)
        _migrate(database, shown(parsed))
    except (SQLAlchemyError, OSError, ModuleNotFoundError, TypeError, ValueError) as error:
        message = f"The database {shown(parsed)} cannot be opened: {_told(error, parsed)}."
        raise ConfigError(code="database_unusable", message=message, hint=_HINT) from None
    return database


def shown(url: URL) -> str:
    """Return a URL without user, password and options, as it may be told."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()


def _told(error: Exception, url: URL) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0].rstrip(".")
    for secret in (url.password, *(value for values in url.normalized_query.values() for value in values)):
        first = first.replace(str(secret), "***") if secret else first
    return first


def _configure_sqlite(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(database: Engine, name: str) -> None:
    with database.connect() as connection:
        revision = _revision(connection)
    if revision == REVISIONS[-1]:  # the usual case, without importing Alembic, which takes its time
        return
    if revision is not None and revision not in REVISIONS:
        raise ConfigError(
            code="database_newer",
            message=f"The database {name} has schema {revision}, and this version of SAGE knows {REVISIONS[-1]} at most.",
            hint="Upgrade SAGE, or give it another database with SAGE_DATABASE_URL.",
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with database.begin() as connection:
        if database.dialect.name == "sqlite":  # whole or not at all, and one after the other
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    try:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except ProgrammingError:
        return None
    except OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
