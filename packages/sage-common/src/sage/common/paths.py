"""Return the folders in which SAGE stores files: folders below SAGE_HOME if this variable is set, else XDG folders."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs.unix import Unix

from sage.common.errors import ConfigError


@dataclass(frozen=True)
class UserPaths:
    """The folders of one user. The folders need not exist."""

    config_dir: Path  #: settings: `config.toml`
    data_dir: Path  #: data that must never be lost: models, run directories
    state_dir: Path  #: the database of the engines, lock files and logs
    cache_dir: Path  #: data that can be created again

    @property
    def models_dir(self) -> Path:
        """Folder with the models (`<org>/<name>`) and the run directories (`finetuned/`)."""
        return self.data_dir / "models"

    @property
    def finetuned_dir(self) -> Path:
        """Folder with one run directory per fine-tuning task."""
        return self.models_dir / "finetuned"

    @property
    def config_file(self) -> Path:
        """The settings file, which need not exist."""
        return self.config_dir / "config.toml"


def get_user_paths() -> UserPaths:
    """Return this user's folders: folders below `SAGE_HOME` if this variable is set, else the XDG folders.

    Source: XDG Base Directory Specification 0.8.
    """
    home = os.environ.get("SAGE_HOME")
    if home:
        root = Path(home).expanduser().absolute()
        return UserPaths(root / "config", root / "data", root / "state", root / "cache")
    xdg = Unix("sage", appauthor=False)
    return UserPaths(xdg.user_config_path, xdg.user_data_path, xdg.user_state_path, xdg.user_cache_path)


@contextlib.contextmanager
def usable_state_folder() -> Iterator[None]:
    """Convert an OSError in the `with` block to a ConfigError about an unusable state folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            code="state_folder_unusable",
            message=f"The state folder {get_user_paths().state_dir} cannot be used: {error.strerror or error}.",
            hint="Make the folder writable, free up disk space, or set SAGE_HOME to another folder.",
        ) from error


def private_folder(path: Path) -> Path:
    """Create a folder and its missing parents, with access for this user only.

    If the folder exists, the access of other users is removed, so use this function only for SAGE's own folders.
    """
    if not path.parent.is_dir():
        private_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    _tighten(path, 0o700)
    return path


def private_file(path: Path) -> Path:
    """Create a file and its missing parent folders. Remove the access of other users, even if the file already exists."""
    if not path.parent.is_dir():
        private_folder(path.parent)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _tighten(path, 0o600)
    return path


def _tighten(path: Path, mode: int) -> None:
    found = path.stat()
    if stat.S_IMODE(found.st_mode) & ~mode & 0o777 and found.st_uid == os.getuid():
        path.chmod(mode)


def tighten(folder: Path) -> None:
    """If the folder exists, remove the access of other users to the folder and its content."""
    if folder.is_dir():
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                if not path.is_symlink():
                    _tighten(path, 0o700 if path.is_dir() else 0o600)
