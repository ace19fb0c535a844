"""Decide whether the name of a model is a path. To start fast, this module does not import model libraries."""

from pathlib import Path


def absolute_name(name: str, base_dir: Path) -> str:
    """Return the absolute path if `name` is a path or the name of a folder below `base_dir`; otherwise return `name`."""
    folder = expanded(name)
    if folder and (is_path(name) or is_folder(base_dir / folder)):
        return str(base_dir.absolute() / folder)
    return name


def is_path(name: str) -> bool:
    """Return whether a name must be a path, because it begins with `/`, `./`, `../` or `~`, or is `.` or `..`."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~"))


def expanded(name: str) -> Path | None:
    """Return a name as a path with `~` expanded; None if the name cannot be a path."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the user in `~user` does not exist
        return None


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; False if the path is invalid or its parent folder cannot be read."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
