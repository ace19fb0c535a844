"""Opening the database: connection settings and migrations."""

from pathlib import Path

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError

from sage.common.errors import ConfigError

#: The newest migration in `migrations/versions/`.
HEAD = "0001"


def open_database(url: str) -> Engine:
    """Return a connected engine whose schema is of today.

    SQLite is opened in WAL mode, synced at every commit, with foreign keys on.
    Raises ConfigError where the URL is wrong or the database cannot be reached.
    """
    try:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        database = create_engine(parsed, pool_pre_ping=not is_sqlite)
        if is_sqlite:
            event.listen(database, "connect", _configure_sqlite)
        _migrate(database)
    except (SQLAlchemyError, OSError, ModuleNotFoundError) as error:
        raise ConfigError(
            code="database_unusable",
            message=f"The database {url} cannot be opened: {str(error).splitlines()[0]}.",
            hint="Correct SAGE_DATABASE_URL, or unset it for SQLite in the state folder.",
        ) from error
    return database


def _configure_sqlite(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(database: Engine) -> None:
    if _revision(database) == HEAD:  # the usual case, without importing Alembic, which takes its time
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(database: Engine) -> str | None:
    with database.connect() as connection:
        try:
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        except (OperationalError, ProgrammingError):
            return None
