"""Restore a backup into the folders of this user."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sage.cli.backup.archive import Manifest, extract, verify
from sage.cli.backup.moving import Moves, move_files, open_restored
from sage.cli.backup.space import check_space, full_disk
from sage.common.disks import is_full
from sage.common.errors import BackupError, Conflict
from sage.common.files import fsync_path, fsync_tree
from sage.common.paths import get_user_paths, private_folder
from sage.common.processes import holder
from sage.common.settings import DATABASE

Begin = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Restored:
    """The result of a restoration."""

    outputs: tuple[Path, ...]  #: output folders that were written
    skipped: tuple[Path, ...]  #: output folders that exist already and were not changed
    set_aside: tuple[Path, ...]  #: new paths of the folders that existed before the restoration


def restore(backup: Path, *, force: bool, outputs: bool, begin: Begin) -> Restored:
    """Verify a backup, and write its files into this user's folders.

    force: if the folders contain data, rename the folders.  outputs: restore the output folders too.
    begin: called before each activity, with its name and the number of bytes to process. `begin` returns a function that is
    called with the number of bytes of each processed part.
    Raises BackupError if the backup is damaged or the disk is full. Raises Conflict if a process uses the folders, or if the
    folders contain data and `force` is False. In these cases, nothing is changed.
    """
    manifest = verify(backup, begin("Verifying", _size(backup)))
    _check_unused(force=force)
    paths = get_user_paths()
    new = {"config": paths.config_dir, "state": paths.state_dir, "data": paths.data_dir, "cache": paths.cache_dir}
    moves = Moves.of({Path(manifest.folders[name]): folder for name, folder in new.items()})
    found = {name: moves.path(Path(folder)) for name, folder in manifest.outputs.items()} if outputs else {}
    # Output folders inside `finetuned_dir` are restored together with `finetuned_dir`.
    inside = {name: folder for name, folder in found.items() if folder.is_relative_to(paths.finetuned_dir)}
    skipped = {name: folder for name, folder in found.items() if name not in inside and _has_entries(folder)}
    written = {name: folder for name, folder in found.items() if name not in inside and name not in skipped}
    # The state folder, which contains the database, is put in place last. After a crash, `restore --force` starts over.
    folders = written | {"runs": paths.finetuned_dir, "config": paths.config_dir, "state": paths.state_dir}
    staged = {name: _staging(folder) for name, folder in folders.items()}
    nested = {name: staged["runs"] / folder.relative_to(paths.finetuned_dir) for name, folder in inside.items()}
    try:
        _extract(backup, manifest, staged, nested, begin)
        move_files(staged.values(), moves)
        open_restored(staged["state"] / DATABASE, moves)
        for folder in staged.values():
            fsync_tree(folder)
        set_aside = [aside for name, folder in folders.items() if (aside := _put(staged[name], folder))]
    except OSError as error:
        if is_full(error):
            raise full_disk(Path(error.filename or paths.data_dir)) from error
        raise
    finally:
        for folder in staged.values():
            shutil.rmtree(folder, ignore_errors=True)
    return Restored((*written.values(), *inside.values()), tuple(skipped.values()), tuple(set_aside))


def _check_unused(*, force: bool) -> None:
    """Raise Conflict if a process uses this user's folders, or if the folders contain data and `force` is False."""
    paths = get_user_paths()
    for folder in (paths.state_dir, paths.finetuned_dir):
        for lock in folder.rglob("*.lock"):
            if process := holder(lock):
                raise Conflict(
                    code="home_in_use",
                    message=f"A running process (PID {process.pid or 'unknown'}) uses {lock.parent}.",
                    hint="Stop the engines (`sage llm engine stop ENGINE`), then the gateway (`sage gateway stop`).",
                )
    data = (paths.state_dir / DATABASE, paths.state_dir / "node-id", paths.config_file, *paths.finetuned_dir.glob("*"))
    if not force and (existing := [path for path in data if path.exists()]):
        raise Conflict(
            code="home_not_empty",
            message=f"{existing[0]} exists, but a backup can be restored only into empty folders.",
            hint="Set SAGE_HOME to an empty folder, or rename the existing folders with --force.",
        )


def _extract(backup: Path, manifest: Manifest, staged: Mapping[str, Path], nested: Mapping[str, Path], begin: Begin) -> None:
    folders = {**staged, **nested}

    def target(name: str) -> Path | None:
        parts = name.split("/")
        for length in (2, 1):
            if folder := folders.get("/".join(parts[:length])):
                return folder.joinpath(*parts[length:])
        return None

    for folder in staged.values():
        check_space(folder, manifest.content_bytes)
    for folder in staged.values():
        shutil.rmtree(folder, ignore_errors=True)
        private_folder(folder)
    extract(backup, target, begin("Restoring", manifest.content_bytes))


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.restoring")


def _put(staged: Path, folder: Path) -> Path | None:
    """Rename the folder `staged` to `folder`.

    If `folder` is not empty, first rename `folder` to a new name. Returns this new name, or None.
    """
    aside = None
    try:
        if _has_entries(folder):
            aside = folder.with_name(f"{folder.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%S}")
            folder.rename(aside)
        staged.rename(folder)
    except OSError as error:
        raise BackupError(
            code="folder_not_replaceable",
            message=f"{folder} cannot be replaced: {error.strerror}.",
            hint="If the folder is a mount point, mount its parent folder instead.",
        ) from error
    fsync_path(folder.parent)
    return aside


def _has_entries(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
