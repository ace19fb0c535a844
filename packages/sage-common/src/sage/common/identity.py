"""Identify a process by its PID and its start time. On Linux, the start time does not depend on the system clock."""

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

#: Placeholder for the PID of a running process whose real PID is unknown.
_UNKNOWN_PID = 0
#: Indexes of the start time (field 22) and the state (field 3) in the part of /proc/PID/stat after the process name.
_START_TICKS, _STATE = 19, 0
#: Maximum number of rounds in `kill_session`. Another round is needed if a process forks before the signal arrives.
_KILL_ROUNDS = 10


@dataclass(frozen=True)
class ProcessIdentity:
    """Identifies a process; a later process with the same PID has a different identity."""

    pid: int
    #: Start time of the process as text; used only to compare identities. On Linux, the text contains the boot id, and the
    #: number of clock ticks between the boot and the start of the process.
    started: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process, possibly a zombie; raises ProcessLookupError if there is no such process."""
        found = _look(pid)
        if found is None:
            raise ProcessLookupError(pid)
        return cls(pid, found.started)

    @classmethod
    def unknown(cls) -> "ProcessIdentity":
        """Return a placeholder for the identity of a running process whose PID is unknown.

        The methods of the placeholder return the same values as for an exited process.
        """
        return cls(_UNKNOWN_PID, "")

    def is_alive(self) -> bool:
        """Return whether the process is running; False for a zombie and for a later process with the same PID."""
        found = _look(self.pid) if self.pid != _UNKNOWN_PID else None
        return found is not None and found.started == self.started and not found.is_zombie

    def process(self) -> psutil.Process | None:
        """Return the process, or None if the process is gone."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid) if self.is_alive() else None
        return None

    def send_signal(self, signal_number: int) -> bool:
        """Send a signal; return False if the process is gone. For a session leader, SIGKILL is sent to its whole session."""
        if not self.is_alive():
            return False
        with contextlib.suppress(ProcessLookupError):
            if signal_number == signal.SIGKILL and os.getsid(self.pid) == self.pid:
                kill_session(self.pid)
            else:
                os.kill(self.pid, signal_number)
        return True

    def memory_bytes(self) -> int | None:
        """Return the resident memory of the process and its descendants, or None if the process is gone."""
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
    """Return the PIDs of all processes, including zombies, by session id."""
    sessions: dict[int, list[int]] = defaultdict(list)
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid:
                sessions[os.getsid(pid)].append(pid)
    return sessions


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the total resident memory of processes; processes that are gone count as 0."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the total CPU time of processes and of their exited children; processes that are gone count as 0."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def kill_session(session_id: int) -> None:
    """Send SIGKILL to every process of a session, including processes forked during this call."""
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
    """Return the id of the current boot of the system; "" if the system does not provide an id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
