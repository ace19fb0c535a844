"""Whether a model's name is a path. The command line needs it without the libraries that load models."""

from pathlib import Path


def absolute_name(name: str, base_dir: Path) -> str:
    """Return the absolute path of a model that is named by a folder relative to `base_dir`, and any other name unchanged."""
    folder = expanded(name)
    if folder and (is_path(name) or is_folder(base_dir / folder)):
        return str(base_dir.absolute() / folder)
    return name


def is_path(name: str) -> bool:
    """Return whether a name can only be a path."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~"))


def expanded(name: str) -> Path | None:
    """Return a name as a path with its ~ expanded; None if it cannot be one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user
        return None


def is_folder(path: Path) -> bool:
    """Return whether there is a folder; False for names that no folder can have or that may not be looked up."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL; a folder that may not be entered
        return False
