"""The local launcher starts detached processes on this machine. A process that has a port listens on the loopback interface.

The handle of a process is the path of the lock file that the process keeps locked. The file `port` in the same folder
contains the port of the process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sage.common.identity import ProcessIdentity, all_sessions, resident_bytes
from sage.common.paths import private_file
from sage.common.processes import (
    ProcessSpec,
    claimed_lock,
    exit_code,
    find_by_environment,
    holder,
    last_holder,
    leftovers,
    start,
)
from sage.llm.control_plane.launchers.base import DESCRIPTOR_ARGUMENT, PORT_ARGUMENT, ProcessObservation, Signal
from sage.llm.control_plane.store.store import port_taken

logger = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_MAX_LAUNCHES, _LAUNCH_SECONDS = 8, 30.0
#: For each process that cannot be observed: the path of the lock file, and the last error.
_reported: dict[Path, str] = {}


class LocalLauncher:
    """Starts, observes and signals processes on this machine."""

    def __init__(self) -> None:
        # Observations and launches have separate threads, because a launch can hang if the storage does not respond.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="launcher")
        self._launch_threads = ThreadPoolExecutor(_MAX_LAUNCHES, thread_name_prefix="launch")
        self._launches: dict[Path, asyncio.Future[str | None]] = {}

    def handle(self, spec: ProcessSpec) -> str:
        """Return the path of the lock file of the process."""
        return str(spec.lock_path)

    async def check_port(self, port: int) -> None:
        """Raise Conflict if the port is taken, or if this user has no permission to listen on the port."""
        _listen(port).close()

    async def launch(self, spec: ProcessSpec) -> str | None:
        """Start a process and return its address, or None if the process does not listen. Raises Conflict or OSError.

        The process keeps its lock file locked. Raises TimeoutError if the launch takes too long. The launch then continues,
        and the next call for the same process waits until this launch ends.
        """
        launch = self._launches.get(spec.lock_path)
        if launch is None:
            launch = asyncio.get_running_loop().run_in_executor(self._launch_threads, _launch, spec)
            self._launches[spec.lock_path] = launch
            launch.add_done_callback(lambda _: self._launches.pop(spec.lock_path))
        async with asyncio.timeout(_LAUNCH_SECONDS):
            return await asyncio.shield(launch)

    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]:
        """Observe all processes with one call in a thread. The result omits processes that could not be observed."""
        locks = [Path(handle) for handle in handles]
        return await asyncio.get_running_loop().run_in_executor(self._threads, _observe, locks)

    async def signal(self, handle: str, signal: Signal) -> None:
        """Send SIGTERM to the process, or SIGKILL to the process and the remaining processes of its session."""
        await asyncio.get_running_loop().run_in_executor(self._threads, _signal, Path(handle), signal)


def _launch(spec: ProcessSpec) -> str | None:
    with claimed_lock(spec.lock_path) as lock:
        if spec.port is None:
            start(spec, lock)
            return None
        with _listen(spec.port) as listener:
            port, descriptor = int(listener.getsockname()[1]), listener.fileno()
            private_file(_port_path(spec.lock_path)).write_text(str(port))
            values = {PORT_ARGUMENT: str(port), DESCRIPTOR_ARGUMENT: str(descriptor)}
            argv = tuple(values.get(argument, argument) for argument in spec.argv)
            start(replace(spec, argv=argv, pass_fds=(*spec.pass_fds, descriptor)), lock)
    return _address(port)


def _observe(locks: Collection[Path]) -> Mapping[str, ProcessObservation]:
    processes: dict[Path, ProcessIdentity | None] = {}
    for lock in locks:
        with _omitted_if_unknown(lock):
            processes[lock] = _process(lock)
    without_file = {lock for lock, process in processes.items() if process is None and not lock.exists()}
    try:
        processes |= find_by_environment(without_file)
        sessions = all_sessions() if any(processes.values()) else {}
    except OSError as error:
        logger.warning("the processes of the engines could not be observed: %s", error)
        return {}
    observations = {}
    for lock, process in processes.items():
        with _omitted_if_unknown(lock):
            # After the process has exited, a child process that inherited the lock can still hold the lock.
            if process is None or (process != last_holder(lock) and leftovers(lock)):
                observations[str(lock)] = _dead(lock)
            else:
                observations[str(lock)] = _living(lock, process, sessions.get(process.pid, [process.pid]))
    return observations


@contextlib.contextmanager
def _omitted_if_unknown(lock: Path) -> Iterator[None]:
    try:
        yield
        _reported.pop(lock, None)
    except OSError as error:
        if _reported.get(lock) != str(error):  # log a repeated error only once
            _reported[lock] = str(error)
            logger.warning("the process that holds the lock file %s cannot be observed: %s", lock, error)


def _living(lock: Path, process: ProcessIdentity, members: Collection[int]) -> ProcessObservation:
    address, memory_bytes = None, resident_bytes(members if process.pid else ()) or None
    with contextlib.suppress(FileNotFoundError, ValueError):  # the process does not listen, or its port file is incomplete
        address = _address(int(_port_path(lock).read_text()))
    return ProcessObservation(alive=True, address=address, pid=process.pid or None, memory_bytes=memory_bytes)


def _dead(lock: Path) -> ProcessObservation:
    code = exit_code(lock)
    # The process has exited, so it cannot start more child processes, and `leftovers` finds all children that are alive.
    return ProcessObservation(alive=False, leftovers=bool(leftovers(lock)), exit_code=code)


def _signal(lock: Path, kind: Signal) -> None:
    process = _process(lock)
    if process is None and not lock.exists():
        process = find_by_environment([lock]).get(lock)
    if kind is Signal.STOP and process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    elif kind is Signal.KILL:
        if process:
            process.send_signal(signal.SIGKILL)
        for pid in leftovers(lock):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _process(lock: Path) -> ProcessIdentity | None:
    """Return the process of a lock file, or None if the process has exited or the lock file was removed."""
    if found := holder(lock):
        return found
    ending = last_holder(lock)  # an exiting process releases its lock shortly before it ends
    return ending if ending and ending.is_alive() else None


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise port_taken(port, error.strerror or str(error)) from error
    return listener


def _port_path(lock: Path) -> Path:
    return lock.with_name("port")


def _address(port: int) -> str:
    return f"{_HOST}:{port}"
