"""Start and find detached processes. Each process holds a file lock, which SAGE uses to find the process later.

The kernel releases the lock when the last process that holds the lock exits. A PID would be less reliable, because another
process can get the same PID later.
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

#: `try_lock` retries for this number of seconds, because a call of `holder` also takes the lock for a moment.
_PROBE_SECONDS = 0.1
#: Maximum seconds to wait for the exit code of a child whose lock is already free.
_COLLECT_SECONDS = 1.0
_EXIT_CODES = 1000

#: Children of this process whose exit codes were not read yet, by lock path.
_children: dict[Path, "subprocess.Popen[bytes]"] = {}
_exit_codes: dict[Path, int] = {}


@dataclass(frozen=True)
class ProcessSpec:
    """A process to start."""

    argv: tuple[str, ...]
    lock_path: Path  #: locked as long as the process is alive
    log_path: Path  #: stdout and stderr of the process are appended to this file
    env: Mapping[str, str] = field(default_factory=dict)  #: variables to add to the environment that the process inherits
    holds_sigterm: bool = False  #: whether the process starts with SIGTERM blocked; the process must unblock SIGTERM
    pass_fds: tuple[int, ...] = ()  #: descriptors that the process inherits, with the same numbers
    port: int | None = None  #: port to listen on (0: any free port); None: the process does not listen


def try_lock(path: Path) -> int | None:
    """Take the lock and return its open descriptor, or None if another process holds the lock."""
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
    """Wait for the lock, and hold the lock in the `with` block. Keep the block short, because other processes wait."""
    with private_file(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_identity(descriptor: int) -> ProcessIdentity:
    """Write the identity of this process into a lock file that this process has locked, and return the identity."""
    identity = ProcessIdentity.of(os.getpid())
    _write(descriptor, identity)
    return identity


def spawn(spec: ProcessSpec) -> ProcessIdentity:
    """Start a detached process in a new session. The process holds the lock `spec.lock_path`.

    Raises Conflict if a process already holds the lock, and OSError if the new process cannot be started.
    """
    with claimed_lock(spec.lock_path) as descriptor:
        return start(spec, descriptor)


@contextlib.contextmanager
def claimed_lock(path: Path) -> Iterator[int]:
    """Take a lock that a new process can inherit; yield the lock's descriptor. Raises Conflict if the lock is held."""
    descriptor = try_lock(path)
    if descriptor is None:
        raise Conflict(code="already_running", message=f"A running process already holds the lock {path}.")
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # if a process was started, it has inherited the lock


def start(spec: ProcessSpec, lock: int) -> ProcessIdentity:
    """Start a process that inherits the lock, and write the identity of the process to the lock file. Raises OSError.

    lock: the descriptor from `claimed_lock`.
    """
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
    except BaseException:  # for example, the disk is full
        child.kill()
        child.wait()
        raise
    _exit_codes.pop(spec.lock_path, None)
    _children[spec.lock_path] = child
    return identity


@contextlib.contextmanager
def _blocked_sigterm(block: bool) -> Iterator[None]:
    """Block SIGTERM in this thread if `block` is True; a child process inherits the blocked signals."""
    if not block:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def holder(lock_path: Path) -> ProcessIdentity | None:
    """Return the process that holds the lock, or None if the lock is free.

    If a process holds the lock but cannot be found, the returned PID is 0.
    """
    _collect(lock_path)  # otherwise a child that has exited would stay a zombie
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
    """Return the running processes that `start` has started with the given lock paths. Keys: lock paths.

    This function reads the environment variables of all processes. It is slow, but needs no lock files. If several processes
    have the same lock path, the result contains the oldest process. The other processes are its descendants.
    """
    wanted, found = {str(path): path for path in lock_paths}, dict[Path, tuple[float, ProcessIdentity]]()
    for pid in psutil.pids() if wanted else ():
        if path := wanted.get(_lock_of(pid)):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                created_at_seconds = psutil.Process(pid).create_time()
                if path not in found or created_at_seconds < found[path][0]:
                    found[path] = created_at_seconds, ProcessIdentity.of(pid)
    return {path: identity for path, (_, identity) in found.items()}


def last_holder(lock_path: Path) -> ProcessIdentity | None:
    """Return the process that the lock file names, even if the process has exited; None if the file names no process."""
    try:
        with lock_path.open("rb") as file:
            return _read(file.fileno())
    except FileNotFoundError:
        return None


def leftovers(lock_path: Path) -> list[int]:
    """Return the PIDs of processes that the last holder of a lock started, and that still run in the holder's session.

    The result is [] if this holder is alive, or if the lock file names no process.
    """
    recorded = last_holder(lock_path)
    if recorded is None or recorded.is_alive():
        return []
    return [pid for pid in session_members(recorded.pid) if _lock_of(pid) == str(lock_path)]


def exit_code(lock_path: Path) -> int | None:
    """Return the exit code of the process that held a lock last; a negative code means that a signal killed the process.

    The result is None if the process is alive or is not a child of the calling process. Only the newest 1000 exit codes are
    kept.
    """
    if child := _children.get(lock_path):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_COLLECT_SECONDS)
        _collect(lock_path)
    return _exit_codes.get(lock_path)


def _collect(lock_path: Path) -> None:
    child = _children.get(lock_path)
    if child is None or (code := child.poll()) is None:
        return
    _exit_codes[lock_path] = code
    _children.pop(lock_path, None)
    while len(_exit_codes) > _EXIT_CODES:
        _exit_codes.pop(next(iter(_exit_codes)), None)


def describe_exit(code: int | None) -> str:
    """Return a description of how a process ended, as part of a sentence."""
    if code is None:
        return "exited (the exit code is unknown, because another gateway started the process)"
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def _lock_of(pid: int) -> str:
    with contextlib.suppress(psutil.Error):  # OSError is not suppressed, because "" would mean that the process has no lock
        return str(psutil.Process(pid).environ().get(_LOCK_PATH_VARIABLE, ""))
    return ""


def _write(descriptor: int, identity: ProcessIdentity) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": identity.pid, "started": identity.started}).encode(), 0)


def _read(descriptor: int) -> ProcessIdentity | None:
    """Return the identity in a lock file; None if the file is empty or was written by an older version."""
    try:
        content = json.loads(os.pread(descriptor, 1024, 0))
        return ProcessIdentity(int(content["pid"]), str(content["started"]))
    except (ValueError, KeyError, TypeError):
        return None
