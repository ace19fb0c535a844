"""Where SAGE keeps its files: the XDG folders, or one folder of the user's choice."""

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs.unix import Unix


@dataclass(frozen=True)
class UserPaths:
    """The folders of one user. None of them is created by looking at them."""

    config_dir: Path  #: settings: `config.toml`
    data_dir: Path  #: what must never be lost: models, run directories
    state_dir: Path  #: the engines' database, locks and logs
    cache_dir: Path  #: what can be made again

    @property
    def models_dir(self) -> Path:
        """Models by name: `<org>/<name>`, and run directories below `finetuned/`."""
        return self.data_dir / "models"

    @property
    def finetuned_dir(self) -> Path:
        """One run directory per fine-tuning task."""
        return self.models_dir / "finetuned"

    @property
    def config_file(self) -> Path:
        """The settings file; it need not exist."""
        return self.config_dir / "config.toml"


def get_user_paths() -> UserPaths:
    """Return this user's folders: below `SAGE_HOME` where that is set, else the XDG ones.

    Source: XDG Base Directory Specification 0.8, on every platform, so that one manual fits all.
    """
    home = os.environ.get("SAGE_HOME")
    if home:
        root = Path(home).expanduser().absolute()
        return UserPaths(root / "config", root / "data", root / "state", root / "cache")
    xdg = Unix("sage", appauthor=False)
    return UserPaths(xdg.user_config_path, xdg.user_data_path, xdg.user_state_path, xdg.user_cache_path)
