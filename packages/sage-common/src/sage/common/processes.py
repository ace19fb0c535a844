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
from sage.common.identity import ProcessIdentity, session_members
from sage.common.paths import private_file, private_folder

__all__ = ["ProcessIdentity", "ProcessSpec", "describe_exit", "exit_code", "find_by_environment", "held_lock", "holder",
           "last_holder", "leftovers", "spawn", "try_lock", "write_identity"]  # fmt: skip

#: Names the inherited descriptor to a child that wants to know that it runs under its lock.
LOCK_FD_VARIABLE = "SAGE_LOCK_FD"
_LOCK_PATH_VARIABLE = "SAGE_LOCK_PATH"

#: `holder` looks by taking a shared lock for an instant; whoever wants the lock outlasts such a look.
_PROBE_SECONDS = 0.1
#: A process drops its lock before its parent can collect it; this long at most.
_COLLECT_SECONDS = 1.0

#: The newest child that this very process started under a lock, kept so that it can be asked for its exit code.
_children: dict[Path, "subprocess.Popen[bytes]"] = {}


@dataclass(frozen=True)
class ProcessSpec:
    """A process to start."""

    argv: tuple[str, ...]
    lock_path: Path  #: held while it lives
    log_path: Path  #: its stdout and stderr are appended here
    env: Mapping[str, str] = field(default_factory=dict)  #: added to the environment of the parent
    holds_sigterm: bool = False  #: SIGTERM waits until the process unblocks it, so that none comes too early
    pass_fds: tuple[int, ...] = ()  #: descriptors that it inherits under the same numbers


def try_lock(path: Path) -> int | None:
    """Take the lock and return its open descriptor, or None if another process holds it."""
    descriptor = os.open(private_file(path), os.O_RDWR | os.O_CLOEXEC)
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
    with private_file(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_identity(descriptor: int) -> ProcessIdentity:
    """Write this process's identity into a lock file that it holds."""
    identity = ProcessIdentity.of(os.getpid())
    _write(descriptor, identity)
    return identity


def spawn(spec: ProcessSpec) -> ProcessIdentity:
    """Start a process in a session of its own, under its lock, with no tie to this one.

    Raises Conflict if a process already runs under that lock, OSError if it cannot be started; then nothing was.
    """
    descriptor = try_lock(spec.lock_path)
    if descriptor is None:
        raise Conflict(code="already_running", message=f"A process already runs under {spec.lock_path}.")
    try:
        private_folder(spec.log_path.parent)
        env = {**os.environ, **spec.env, LOCK_FD_VARIABLE: str(descriptor), _LOCK_PATH_VARIABLE: str(spec.lock_path)}
        with private_file(spec.log_path).open("ab") as log, _blocked_sigterm(spec.holds_sigterm):
            child = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=(descriptor, *spec.pass_fds),
                start_new_session=True,
            )
        try:
            identity = ProcessIdentity.of(child.pid)
            _write(descriptor, identity)
        except BaseException:  # a full disk: a process that nobody could find must not live on
            child.kill()
            child.wait()
            raise
        _children[spec.lock_path] = child
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
    """Return who holds the lock, or None if it is free; one whose PID cannot be found has the PID 0."""
    if child := _children.get(lock_path):
        child.poll()  # or it would stay a zombie
    try:
        descriptor = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        recorded = _read(descriptor)
        if recorded and recorded.is_alive():
            return recorded
        return find_by_environment(lock_path) or ProcessIdentity.unknown()
    finally:
        os.close(descriptor)
    return None


def find_by_environment(lock_path: Path) -> ProcessIdentity | None:
    """Return a process that was started under a lock, by its environment: slow, but it needs no lock file.

    It finds the holder whose parent died before it wrote down who it is, and the one whose lock file was removed.
    """
    for pid in psutil.pids():
        if _is_of(pid, lock_path):
            with contextlib.suppress(ProcessLookupError):
                return ProcessIdentity.of(pid)
    return None


def last_holder(lock_path: Path) -> ProcessIdentity | None:
    """Return who wrote down that it holds the lock, whether it lives or not; None if nobody did."""
    try:
        with lock_path.open("rb") as file:
            return _read(file.fileno())
    except FileNotFoundError:
        return None


def leftovers(lock_path: Path) -> list[int]:
    """Return the PIDs that a process which is gone has left in its session; none while it lives."""
    recorded = last_holder(lock_path)
    if recorded is None or recorded.is_alive():
        return []
    return [pid for pid in session_members(recorded.pid) if _is_of(pid, lock_path)]


def exit_code(lock_path: Path) -> int | None:
    """Return how the last process under a lock ended (negative: a signal); None if it lives, or was another's child."""
    child = _children.get(lock_path)
    if child is None:
        return None
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(_COLLECT_SECONDS)
    return None


def describe_exit(code: int | None) -> str:
    """Return how a process ended, as the rest of a sentence."""
    if code is None:
        return "ended (its exit code is unknown, since another gateway had started it)"
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def _is_of(pid: int, lock_path: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).environ().get(_LOCK_PATH_VARIABLE) == str(lock_path)
    return False


def _write(descriptor: int, identity: ProcessIdentity) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": identity.pid, "started": identity.started}).encode(), 0)


def _read(descriptor: int) -> ProcessIdentity | None:
    """Return who wrote the lock file; None for an empty one, and for one of an older version."""
    try:
        content = json.loads(os.pread(descriptor, 1024, 0))
        return ProcessIdentity(int(content["pid"]), str(content["started"]))
    except (ValueError, KeyError, TypeError):
        return None
