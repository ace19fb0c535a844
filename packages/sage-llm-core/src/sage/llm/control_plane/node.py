"""The id of this node. A node is a SAGE installation with its own state folder; several nodes can share one database."""

import os
import secrets
from pathlib import Path

from sage.common.paths import get_user_paths, tighten, usable_state_folder
from sage.common.processes import held_lock


def node_id_path() -> Path:
    """Return the path of the file that contains this node's id."""
    return get_user_paths().state_dir / "node-id"


def open_state_folder() -> str:
    """Make the state and settings folders private to the user, and return the node's id.

    Raises ConfigError if the permissions of a folder cannot be changed, or if the file with the id cannot be used.
    """
    paths = get_user_paths()
    with usable_state_folder():
        tighten(paths.config_dir)
        tighten(paths.state_dir)
        return _node_id()


def _node_id() -> str:
    path = node_id_path()
    with held_lock(path), path.open("r+", encoding="utf-8") as file:
        found = file.read().strip()
        if not found:
            found = f"node-{secrets.token_hex(8)}"
            file.write(f"{found}\n")
            file.flush()
            os.fsync(file.fileno())
    return found
