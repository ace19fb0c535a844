"""Detached processes on this machine."""

import socket
from pathlib import Path

from sage.common.processes import ProcessIdentity, ProcessSpec, exit_code, holder, spawn


class LocalLauncher:
    """Starts processes in sessions of their own on this machine."""

    def __init__(self) -> None:
        self.node = socket.gethostname()

    def launch(self, spec: ProcessSpec) -> ProcessIdentity:
        """Start a process under its lock; raises Conflict where that is held."""
        return spawn(spec)

    def observe(self, lock_path: Path) -> ProcessIdentity | None:
        """Return the process that holds a lock, or None where nothing does."""
        return holder(lock_path)

    def signal(self, identity: ProcessIdentity, signal_number: int) -> bool:
        """Send a signal; False where the process is gone."""
        return identity.send_signal(signal_number)

    def collect(self, identity: ProcessIdentity) -> int | None:
        """Return how a process ended, where this very process started it."""
        return exit_code(identity)
