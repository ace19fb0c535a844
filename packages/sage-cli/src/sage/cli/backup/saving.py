"""Write a backup while the gateway and the engines run."""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO

from sage.cli.backup import sources
from sage.cli.backup.archive import ArchiveWriter, Manifest
from sage.cli.backup.sources import Source
from sage.cli.backup.space import check_space, full_disk
from sage.common.disks import is_full
from sage.common.errors import ConfigError, Conflict
from sage.common.files import fsync_path
from sage.common.paths import get_user_paths
from sage.common.settings import DATABASE, load_settings
from sage.libs.finetune.run.checkpoints import list_checkpoints

_BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Content:
    """The optional content of a backup. Every backup contains the settings, the state and the run directories."""

    database: bool = True
    all_checkpoints: bool = False
    outputs: bool = True


def save(target: Path, content: Content, begin: Callable[[int], Callable[[int], None]]) -> int:
    """Write a backup to `target` atomically and return its size in bytes.

    begin: called with the total size in bytes; returns a function, which is called with the size of each written part.
    Raises ConfigError, Conflict or BackupError. If writing fails, the incomplete file is removed.
    """
    if target.exists():
        raise Conflict(
            code="backup_exists", message=f"{target} exists already.", hint="Choose another name, or remove the file."
        )
    if content.database:
        _check_database()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            # The database is copied first, because a gateway accepts run directories that are newer than the database.
            database = _copy_database(Path(folder)) if content.database else None
            aside = Path(f"{folder}.partial")  # the name of `folder` is unique; files with this ending are not backed up
            try:
                _write(aside, database, content, begin)
                os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)
        fsync_path(target.parent)
    except OSError as error:
        if is_full(error):
            raise full_disk(target.parent) from error
        raise
    return target.stat().st_size


def _check_database() -> None:
    if load_settings().database_url:
        raise ConfigError(
            code="database_elsewhere",
            message="database_url selects a database outside the state folder. A backup cannot contain this database.",
            hint="Run `pg_dump` (PostgreSQL) or `sqlite3 FILE .backup` (SQLite), then `sage backup --no-database`.",
        )


def _copy_database(folder: Path) -> Path | None:
    """Return a consistent copy of the database; None if there is no database yet."""
    database = get_user_paths().state_dir / DATABASE
    if not database.exists():
        return None
    check_space(folder, database.stat().st_size)
    copy = folder / DATABASE
    with (
        closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


def _write(aside: Path, database: Path | None, content: Content, begin: Callable[[int], Callable[[int], None]]) -> None:
    outputs = sources.output_folders() if content.outputs else []
    files = [*sources.settings_and_state(), *sources.run_directories(all_checkpoints=content.all_checkpoints), *outputs]
    total_bytes = sum(_size(path) for source in files for path in source.files) + (_size(database) if database else 0)
    check_space(aside.parent, total_bytes)
    paths = get_user_paths()
    manifest = Manifest(
        sage_version=version("sage-cli"),
        created_at=datetime.now(UTC).isoformat(),
        has_database=database is not None,
        folders={
            "config": str(paths.config_dir), "state": str(paths.state_dir), "data": str(paths.data_dir),
            "cache": str(paths.cache_dir),
        },
        outputs={source.name: str(source.folder) for source in outputs},
    )  # fmt: skip
    with _private(aside) as file:
        writer = ArchiveWriter(file, begin(total_bytes))
        if database:
            with database.open("rb") as copy:
                writer.add(f"state/{DATABASE}", copy)
        for source in files:
            _add(writer, source)
        writer.finish(manifest)
        file.flush()
        os.fsync(file.fileno())


def _add(writer: ArchiveWriter, source: Source) -> None:
    if source.is_checkpoint:
        _add_checkpoint(writer, source)
        return
    for path in source.files:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # skip a file that was removed meanwhile
            writer.add(f"{source.name}/{path.relative_to(source.folder)}", file)


def _add_checkpoint(writer: ArchiveWriter, source: Source) -> None:
    """Add a checkpoint; if the run has removed the checkpoint in the meantime, add the newest checkpoint of the run."""
    folder, files = source.folder, source.files
    while True:
        with ExitStack() as stack:
            try:  # open all files first: the content of an open file is kept if the run removes the checkpoint
                opened = [(path, stack.enter_context(path.open("rb"))) for path in files]
            except FileNotFoundError:
                opened = []
            for path, file in opened:
                writer.add(f"{source.name.rpartition('/')[0]}/{folder.name}/{path.relative_to(folder)}", file)
        newest = list_checkpoints(folder.parent)[-1:]
        if opened or not newest or newest[0].path == folder:
            return
        folder = newest[0].path
        files = sources.files_below(folder)


@contextlib.contextmanager
def _private(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that only this user can read, because a backup contains keys and training data."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
