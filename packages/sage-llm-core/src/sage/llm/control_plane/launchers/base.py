"""The launcher: what the control plane needs of the place where a process runs."""

from pathlib import Path
from typing import Protocol

from sage.common.identity import ProcessIdentity
from sage.common.processes import ProcessSpec


class Launcher(Protocol):
    """A place where processes run; they outlive the control plane. A process is named by the lock that it holds."""

    def launch(self, spec: ProcessSpec) -> ProcessIdentity:
        """Start a process under its lock; raises Conflict if that is held, OSError if it cannot be started."""

    def observe(self, lock_path: Path) -> ProcessIdentity | None:
        """Return the process that holds a lock, or None if it is gone; raises OSError if that cannot be found out."""

    def has_leftovers(self, lock_path: Path) -> bool:
        """Return whether the process is gone and others of its session are not."""

    def stop(self, lock_path: Path) -> None:
        """Ask a process to end."""

    def kill(self, lock_path: Path) -> None:
        """End a process with its whole session, whatever is left of it."""

    def exit_code(self, lock_path: Path) -> int | None:
        """Return how a process ended (negative: a signal), or None if that is not known."""
