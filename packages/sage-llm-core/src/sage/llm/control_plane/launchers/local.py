"""Detached processes on this machine."""

import contextlib
import os
import signal
from pathlib import Path

from sage.common.identity import ProcessIdentity
from sage.common.processes import ProcessSpec, exit_code, find_by_environment, holder, last_holder, leftovers, spawn


class LocalLauncher:
    """Starts processes in sessions of their own on this machine."""

    def launch(self, spec: ProcessSpec) -> ProcessIdentity:
        """Start a process under its lock; raises Conflict if that is held, OSError if it cannot be started."""
        return spawn(spec)

    def observe(self, lock_path: Path) -> ProcessIdentity | None:
        """Return the process that holds a lock, or None if it is gone; one whose lock file was removed still lives."""
        if found := holder(lock_path):
            return found
        leaving = last_holder(lock_path)  # the kernel drops the locks of a process that ends before the process itself
        if leaving and leaving.is_alive():
            return leaving
        return None if lock_path.exists() else find_by_environment(lock_path)

    def has_leftovers(self, lock_path: Path) -> bool:
        """Return whether the process is gone and others of its session are not."""
        return bool(leftovers(lock_path))

    def stop(self, lock_path: Path) -> None:
        """Send SIGTERM to the process, not to its session: it saves first. One that was suspended goes on to do so."""
        if process := self.observe(lock_path):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)

    def kill(self, lock_path: Path) -> None:
        """Send SIGKILL to the process and to its session, or to what is left of it."""
        if process := self.observe(lock_path):
            process.send_signal(signal.SIGKILL)
        for pid in leftovers(lock_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def exit_code(self, lock_path: Path) -> int | None:
        """Return how a process ended, if this very process started it."""
        return exit_code(lock_path)
