"""The launcher: the four things that the control plane needs of the place where a process runs."""

from pathlib import Path
from typing import Protocol

from sage.common.processes import ProcessIdentity, ProcessSpec


class Launcher(Protocol):
    """A place where processes run; they outlive the control plane."""

    node: str

    def launch(self, spec: ProcessSpec) -> ProcessIdentity:
        """Start a process under its lock; raises Conflict where that is held."""

    def observe(self, lock_path: Path) -> ProcessIdentity | None:
        """Return the process that holds a lock, or None where nothing does."""

    def signal(self, identity: ProcessIdentity, signal_number: int) -> bool:
        """Send a signal; False where the process is gone."""

    def collect(self, identity: ProcessIdentity) -> int | None:
        """Return how a process ended (negative: a signal), or None where that is not known."""
