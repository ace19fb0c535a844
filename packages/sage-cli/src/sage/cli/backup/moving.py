"""Replace absolute paths in restored files and databases, because the folders of this user can be in other places."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sage.common.errors import BackupError

#: JSON files with absolute paths. Files of checkpoints are not changed, because changed files would not match the checksums
#: in the checkpoint.
_FILES = ("spec.json", "sage_run.json", "adapter_config.json")
_COLUMNS = {
    "engines": ("model", "options", "base", "adapter", "form", "serve"),
    "servers": ("model", "handle", "options"),
}


@dataclass(frozen=True)
class Moves:
    """The folders whose paths have changed: the old and the new path of each folder."""

    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, folders: Mapping[Path, Path]) -> "Moves":
        """Return the moves of folders.  folders: a mapping from old paths to new paths."""
        return cls(tuple((str(old), str(new)) for old, new in folders.items() if old != new))

    def path(self, path: Path) -> Path:
        """Return the new path of a file or folder."""
        return Path(self.text(str(path)))

    def text(self, text: str) -> str:
        """Return `text`, which is a path or JSON, with the old paths replaced by the new paths."""
        for old, new in self.pairs:
            if text == old or text.startswith(f"{old}/"):
                return new + text.removeprefix(old)
            text = text.replace(f"{_json(old)}/", f"{_json(new)}/")
        return text


def _json(path: str) -> str:
    """Return a path as a JSON string without the closing quote."""
    return json.dumps(path)[:-1]


def move_files(folders: Iterable[Path], moves: Moves) -> None:
    """Replace the old paths in the JSON files below the restored folders."""
    for folder in folders if moves.pairs else ():
        for name in _FILES:
            for path in folder.rglob(name):
                if not any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts):
                    path.write_text(moves.text(path.read_text(encoding="utf-8")), encoding="utf-8")


def open_restored(database: Path, moves: Moves) -> None:
    """Check the restored database, replace the old paths in it, and release its leases.

    Raises BackupError if the database is damaged.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database)) as connection, connection:
            [answer] = connection.execute("PRAGMA quick_check(1)").fetchone()
            if answer != "ok":
                raise sqlite3.DatabaseError(answer)
            for table, columns in _COLUMNS.items():
                for column in columns:
                    _move_column(connection, table, column, moves)
            # The leases belong to the gateway that ran when the backup was written. The expiry times of
            # the leases are not reliable, because these times can come from the clock of another machine.
            connection.execute("UPDATE leases SET holder = NULL, expires_at = '2000-01-01 00:00:00.000000'")
    except sqlite3.Error as error:
        raise BackupError(
            code="backup_damaged",
            message=f"The database in the backup cannot be used: {error}. Nothing was changed.",
            hint="Use another backup.",
        ) from error


def _move_column(connection: sqlite3.Connection, table: str, column: str, moves: Moves) -> None:
    rows = connection.execute(f"SELECT rowid, {column} FROM {table} WHERE {column} IS NOT NULL").fetchall()  # noqa: S608
    for row, value in rows:
        if (moved := moves.text(value)) != value:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))  # noqa: S608
