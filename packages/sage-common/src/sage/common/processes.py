"""Detached processes: each is started under a file lock and found again after its parent is gone.

A process is alive as long as its lock is held. The kernel releases a lock when its last holder ends, however it ends, and a
lock cannot be reused as a PID can. The child inherits the locked descriptor, so it needs no code for this.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sage.common.errors import Conflict
from sage.common.identity import ProcessIdentity, session_members
from sage.common.paths import private_file, private_folder

__all__ = ["ProcessIdentity", "ProcessSpec", "claimed_lock", "describe_exit", "exit_code", "find_by_environment",
           "held_lock", "holder", "last_holder", "leftovers", "spawn", "start", "try_lock", "write_identity"]  # fmt: skip

#: Environment variable with the number of the inherited lock descriptor.
LOCK_FD_VARIABLE = "SAGE_LOCK_FD"
_LOCK_PATH_VARIABLE = "SAGE_LOCK_PATH"

#: `holder` takes a shared lock for an instant; `try_lock` retries for longer than that.
_PROBE_SECONDS = 0.1
#: A process releases its lock before its parent can collect its exit code; this much earlier at most.
_COLLECT_SECONDS = 1.0
#: Exit codes of the last processes that ended are kept.
_EXIT_CODES = 1000

#: The children of this process that have not been collected, by their lock.
_children: dict[Path, "subprocess.Popen[bytes]"] = {}
_exit_codes: dict[Path, int] = {}


@dataclass(frozen=True)
class ProcessSpec:
    """A process to start."""

    argv: tuple[str, ...]
    lock_path: Path  #: locked while the process lives
    log_path: Path  #: its stdout and stderr are appended here
    env: Mapping[str, str] = field(default_factory=dict)  #: added to the parent's environment
    holds_sigterm: bool = False  #: block SIGTERM until the process unblocks it, so that an early one is not lost
    pass_fds: tuple[int, ...] = ()  #: descriptors to inherit, under the same numbers
    port: int | None = None  #: port to listen on, 0 for any free one; None: the process does not listen


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
    """Wait for the lock and hold it within the block; for short work that must not run twice at once."""
    with private_file(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_identity(descriptor: int) -> ProcessIdentity:
    """Write this process's identity into a lock file that it holds."""
    identity = ProcessIdentity.of(os.getpid())
    _write(descriptor, identity)
    return identity


def spawn(spec: ProcessSpec) -> ProcessIdentity:
    """Start a detached process under its lock, in a session of its own.

    Raises Conflict if a process already runs under that lock, OSError if the process cannot be started.
    """
    with claimed_lock(spec.lock_path) as descriptor:
        return start(spec, descriptor)


@contextlib.contextmanager
def claimed_lock(path: Path) -> Iterator[int]:
    """Hold the lock of a process to be started; raises Conflict if a process already runs under it."""
    descriptor = try_lock(path)
    if descriptor is None:
        raise Conflict(code="already_running", message=f"A process already runs under {path}.")
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # a process that was started has inherited the lock


def start(spec: ProcessSpec, lock: int) -> ProcessIdentity:
    """Start a process that inherits `lock`, the descriptor of its claimed lock; raises OSError."""
    private_folder(spec.log_path.parent)
    env = {**os.environ, **spec.env, LOCK_FD_VARIABLE: str(lock), _LOCK_PATH_VARIABLE: str(spec.lock_path)}
    with private_file(spec.log_path).open("ab") as log, _blocked_sigterm(spec.holds_sigterm):
        child = subprocess.Popen(
            spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(lock, *spec.pass_fds),
            start_new_session=True,
        )
    try:
        identity = ProcessIdentity.of(child.pid)
        _write(lock, identity)
    except BaseException:  # such as a full disk: a process that nobody can find must not live on
        child.kill()
        child.wait()
        raise
    _exit_codes.pop(spec.lock_path, None)
    _children[spec.lock_path] = child
    return identity


@contextlib.contextmanager
def _blocked_sigterm(block: bool) -> Iterator[None]:
    """Block SIGTERM in this thread; a child inherits this."""
    if not block:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def holder(lock_path: Path) -> ProcessIdentity | None:
    """Return the process that holds the lock, or None if it is free; the PID is 0 if the process cannot be found."""
    _collect(lock_path)  # or the child would stay a zombie
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
        return find_by_environment({lock_path}).get(lock_path) or ProcessIdentity.unknown()
    finally:
        os.close(descriptor)
    return None


def find_by_environment(lock_paths: Collection[Path]) -> Mapping[Path, ProcessIdentity]:
    """Return the processes that were started under locks, found by their environment in one pass over all processes.

    Slow, but it needs no lock file: it also finds a process whose parent died before writing the lock file, or whose lock
    file was removed. Of several processes under one lock, the oldest is returned.
    """
    wanted, found = {str(path): path for path in lock_paths}, dict[Path, ProcessIdentity]()
    for pid in psutil.pids() if wanted else ():
        path = wanted.get(_lock_of(pid))
        if path and path not in found:
            with contextlib.suppress(ProcessLookupError):
                found[path] = ProcessIdentity.of(pid)
    return found


def last_holder(lock_path: Path) -> ProcessIdentity | None:
    """Return the process that last wrote its identity into the lock file, alive or not; None if none did."""
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
    return [pid for pid in session_members(recorded.pid) if _lock_of(pid) == str(lock_path)]


def exit_code(lock_path: Path) -> int | None:
    """Return the exit code of the last process under a lock (negative: a signal).

    None if the process lives, was started by another process, or ended long ago.
    """
    if child := _children.get(lock_path):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_COLLECT_SECONDS)
        _collect(lock_path)
    return _exit_codes.get(lock_path)


def _collect(lock_path: Path) -> None:
    """Keep the exit code of a child that has ended, and forget the child."""
    child = _children.get(lock_path)
    if child is None or (code := child.poll()) is None:
        return
    _exit_codes[lock_path] = code
    _children.pop(lock_path, None)
    while len(_exit_codes) > _EXIT_CODES:
        _exit_codes.pop(next(iter(_exit_codes)), None)


def describe_exit(code: int | None) -> str:
    """Return how a process ended, as the rest of a sentence."""
    if code is None:
        return "exited (its exit code is unknown, since another gateway had started it)"
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def _lock_of(pid: int) -> str:
    """Return the lock that a process was started under, from its environment; empty if there is none."""
    with contextlib.suppress(psutil.Error):  # not OSError: without free descriptors nothing is known
        return str(psutil.Process(pid).environ().get(_LOCK_PATH_VARIABLE, ""))
    return ""


def _write(descriptor: int, identity: ProcessIdentity) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": identity.pid, "started": identity.started}).encode(), 0)


def _read(descriptor: int) -> ProcessIdentity | None:
    """Return the identity in a lock file; None for an empty file and for one of an older version."""
    try:
        content = json.loads(os.pread(descriptor, 1024, 0))
        return ProcessIdentity(int(content["pid"]), str(content["started"]))
    except (ValueError, KeyError, TypeError):
        return None
