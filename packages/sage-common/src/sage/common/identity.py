"""Identity of a process: its PID with its start time in kernel ticks, which no change of the clock affects."""

import contextlib
import functools
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Stands for a process that lives and whose PID is not known.
_UNKNOWN_PID = 0
#: Fields 22 and 3 of /proc/PID/stat, counted from the one after the process name, which may contain any character.
_START_TICKS, _STATE = 19, 0
#: A session may fork while it is being killed; it is scanned at most this many times.
_KILL_ROUNDS = 10


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinct from a later one with the same PID."""

    pid: int
    started: str  #: id of the boot and ticks since then; only ever compared

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process, which may be a zombie; raises ProcessLookupError if there is none."""
        found = _look(pid)
        if found is None:
            raise ProcessLookupError(pid)
        return cls(pid, found.started)

    @classmethod
    def unknown(cls) -> "ProcessIdentity":
        """Return the identity of a process that lives but whose PID is not known; it cannot be signalled."""
        return cls(_UNKNOWN_PID, "")

    def is_alive(self) -> bool:
        """Return whether the process runs; False for a zombie, and for a later process with the same PID."""
        found = _look(self.pid) if self.pid != _UNKNOWN_PID else None
        return found is not None and found.started == self.started and not found.is_zombie

    def process(self) -> psutil.Process | None:
        """Return the process, or None if it is gone or its PID was reused."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid) if self.is_alive() else None
        return None

    def send_signal(self, signal_number: int) -> bool:
        """Send a signal; return False if the process is gone. SIGKILL goes to its whole session if it leads one."""
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
    """Return the PIDs of a session's processes, without zombies."""
    return [pid for pid in all_sessions().get(session_id, ()) if _is_running(pid)]


def all_sessions() -> Mapping[int, list[int]]:
    """Return the PIDs of every session, zombies included: one pass over all processes."""
    sessions: dict[int, list[int]] = defaultdict(list)
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid:
                sessions[os.getsid(pid)].append(pid)
    return sessions


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of processes; those that are gone count as 0."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


def kill_session(session_id: int) -> None:
    """Send SIGKILL to every process of a session, including those forked in the meantime."""
    for _ in range(_KILL_ROUNDS):
        members = session_members(session_id)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not members:
            return


def _is_running(pid: int) -> bool:
    found = _look(pid)
    return found is not None and not found.is_zombie


@dataclass(frozen=True)
class _Found:
    started: str
    is_zombie: bool


def _look(pid: int) -> _Found | None:
    """Return start and state of a process, or None if there is none; raises OSError if they cannot be read."""
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
    """Return the id of the current boot of the machine; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
