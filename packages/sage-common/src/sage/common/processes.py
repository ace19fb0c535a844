"""Detached processes: started under a file lock, recognised after their parent is gone, signalled safely.

A process is alive exactly as long as its lock is held: the kernel drops a lock with its last holder, whatever killed it,
and a lock cannot be reused as a PID can. The child inherits the locked descriptor, so it needs no knowledge of this.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sage.common.errors import Conflict

#: Names the inherited descriptor to a child that wants to know that it runs under its lock.
LOCK_FD_VARIABLE = "SAGE_LOCK_FD"
_LOCK_PATH_VARIABLE = "SAGE_LOCK_PATH"

#: `holder` looks by taking a shared lock for an instant; whoever wants the lock outlasts such a look.
_PROBE_SECONDS = 0.1
#: Who holds a lock without having left a name: it lives, and cannot be signalled.
_UNKNOWN_PID = 0

#: Children of this very process, kept so that they can be reaped and asked for their exit code.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ProcessSpec:
    """A process to start."""

    argv: tuple[str, ...]
    lock_path: Path  #: held while it lives
    log_path: Path  #: its stdout and stderr are appended here
    env: Mapping[str, str] = field(default_factory=dict)  #: added to the environment of the parent
    holds_sigterm: bool = False  #: SIGTERM waits until the process unblocks it, so that none comes too early


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that can be told from a later one of the same PID."""

    pid: int
    start_time: float  #: seconds since the epoch, as the kernel counts

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process that runs now; raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """Return the process, or None where it is gone or its PID belongs to another one now."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.start_time) < 0.05:
                return process
        return None

    def send_signal(self, signal_number: int) -> bool:
        """Send a signal; False where the process is gone."""
        process = self.process()
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)
        return True

    def memory_bytes(self) -> int | None:
        """Resident memory of the process and its children, or None where it is gone."""
        process = self.process()
        if process is None:
            return None
        total = 0
        with contextlib.suppress(psutil.Error):
            for member in (process, *process.children(recursive=True)):
                total += member.memory_info().rss
        return total


def try_lock(path: Path) -> int | None:
    """Take the lock and return its open descriptor, or None where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.005)
        else:
            return descriptor


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Wait for the lock, hold it for the length of the block; for short work that must not run twice at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_identity(descriptor: int) -> ProcessIdentity:
    """Write this process's identity into a lock file that it holds."""
    identity = ProcessIdentity.of(os.getpid())
    _write(descriptor, identity)
    return identity


def spawn(spec: ProcessSpec) -> ProcessIdentity:
    """Start a process in a session of its own, under its lock, with no tie to this one.

    Raises Conflict where a process already runs under that lock, OSError where it cannot be started.
    """
    descriptor = try_lock(spec.lock_path)
    if descriptor is None:
        raise Conflict(code="already_running", message=f"A process already runs under {spec.lock_path}.")
    try:
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **spec.env, LOCK_FD_VARIABLE: str(descriptor), _LOCK_PATH_VARIABLE: str(spec.lock_path)}
        with spec.log_path.open("ab") as log, _blocked_sigterm(spec.holds_sigterm):
            child = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        identity = ProcessIdentity.of(child.pid)
        _children[child.pid] = child
        _write(descriptor, identity)
        return identity
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _blocked_sigterm(block: bool) -> Iterator[None]:
    """Block SIGTERM in this thread, for a child to inherit."""
    if not block:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def holder(lock_path: Path) -> ProcessIdentity | None:
    """Return who holds the lock, or None where it is free."""
    for child in list(_children.values()):
        child.poll()
    try:
        descriptor = os.open(lock_path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor) or _find_by_environment(lock_path) or ProcessIdentity(_UNKNOWN_PID, 0.0)
    finally:
        os.close(descriptor)
    return None


def exit_code(identity: ProcessIdentity) -> int | None:
    """Return how a child of this very process ended (negative: a signal), or None where that is not known."""
    child = _children.get(identity.pid)
    return child.poll() if child else None


def _write(descriptor: int, identity: ProcessIdentity) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": identity.pid, "start_time": identity.start_time}).encode(), 0)


def _read(descriptor: int) -> ProcessIdentity | None:
    try:
        content = json.loads(os.pread(descriptor, 1024, 0))
        identity = ProcessIdentity(content["pid"], content["start_time"])
    except (ValueError, KeyError):
        return None
    return identity if identity.process() else None


def _find_by_environment(lock_path: Path) -> ProcessIdentity | None:
    """Find the holder whose parent died between starting it and writing down who it is."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_LOCK_PATH_VARIABLE) == str(lock_path):
                return ProcessIdentity(process.pid, process.create_time())
    return None
