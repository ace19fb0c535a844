"""Which process is meant: a PID with the moment of its start, as the kernel counts it and no clock can change it."""

import contextlib
import functools
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Stands for a process that lives and whose PID is not known.
_UNKNOWN_PID = 0
#: Field 22 of /proc/PID/stat, and field 3, counted from the one behind the name, which may hold anything.
_START_TICKS, _STATE = 19, 0
#: A session that is being killed may still fork; so many rounds at most.
_KILL_ROUNDS = 10


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinct from a later one with the same PID."""

    pid: int
    started: str  #: the boot's id and the ticks since then; compared, never computed with

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process, also of one that ended and was not collected; raises ProcessLookupError."""
        found = _look(pid)
        if found is None:
            raise ProcessLookupError(pid)
        return cls(pid, found.started)

    @classmethod
    def unknown(cls) -> "ProcessIdentity":
        """Return what stands for a process that lives, but cannot be signalled."""
        return cls(_UNKNOWN_PID, "")

    def is_alive(self) -> bool:
        """Return whether it runs; a zombie does not, and another process of its PID is not it."""
        found = _look(self.pid) if self.pid != _UNKNOWN_PID else None
        return found is not None and found.started == self.started and not found.is_zombie

    def process(self) -> psutil.Process | None:
        """Return the process, or None if it is gone or its PID belongs to another one now."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid) if self.is_alive() else None
        return None

    def send_signal(self, signal_number: int) -> bool:
        """Send a signal; False if the process is gone. SIGKILL takes its whole session with it, if it leads one."""
        if not self.is_alive():
            return False
        with contextlib.suppress(ProcessLookupError):
            if signal_number == signal.SIGKILL and os.getsid(self.pid) == self.pid:
                kill_session(self.pid)
            else:
                os.kill(self.pid, signal_number)
        return True

    def memory_bytes(self) -> int | None:
        """Resident memory of the process and its children, or None if it is gone."""
        process = self.process()
        if process is None:
            return None
        total = 0
        with contextlib.suppress(psutil.Error):
            for member in (process, *process.children(recursive=True)):
                total += member.memory_info().rss
        return total


def session_members(session_id: int) -> list[int]:
    """Return the PIDs of a session's processes."""
    return [pid for pid in psutil.pids() if pid and _is_member(pid, session_id)]


def kill_session(session_id: int) -> None:
    """Kill every process of a session, those included that are forked meanwhile."""
    for _ in range(_KILL_ROUNDS):
        members = session_members(session_id)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not members:
            return


def _is_member(pid: int, session_id: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getsid(pid) == session_id:
            found = _look(pid)
            return found is not None and not found.is_zombie
    return False


@dataclass(frozen=True)
class _Found:
    started: str
    is_zombie: bool


def _look(pid: int) -> _Found | None:
    """Return what the kernel says of a process, or None if there is none; raises OSError if it cannot be asked."""
    if sys.platform != "linux":
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            return _Found(repr(process.create_time()), process.status() == psutil.STATUS_ZOMBIE)
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Found(f"{boot_id()}/{fields[_START_TICKS]}", fields[_STATE] in "ZX")


@functools.cache
def boot_id() -> str:
    """Return what tells this boot of the machine from every other; empty if the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
