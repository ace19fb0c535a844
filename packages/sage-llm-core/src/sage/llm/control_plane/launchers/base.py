"""The launcher interface: the operations on processes that the control plane needs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sage.common.processes import ProcessSpec

#: Placeholders in ProcessSpec.argv. `launch` replaces them with the port and the descriptor of the listening socket.
PORT_ARGUMENT, DESCRIPTOR_ARGUMENT = "{port}", "{descriptor}"


class Signal(StrEnum):
    """The signals that end a process."""

    STOP = "stop"  #: send SIGTERM, so that the process saves its state and exits; also continue a suspended process
    KILL = "kill"  #: send SIGKILL to the process and all other processes of its session


@dataclass(frozen=True)
class ProcessObservation:
    """The result of observing a process."""

    alive: bool
    leftovers: bool = False  #: True: the process has exited, but other processes of its session are alive
    address: str | None = None  #: HOST:PORT on which the process listens
    pid: int | None = None  #: None: the process has exited, or its PID is not known
    memory_bytes: int | None = None  #: resident memory of all processes of the session
    exit_code: int | None = None  #: -N: killed by signal N; None: the process is alive, or the code is not known


class Launcher(Protocol):
    """Starts, observes and signals processes. The processes continue to run after the control plane exits."""

    def handle(self, spec: ProcessSpec) -> str:
        """Return the identifier of a process for `observe` and `signal`. The process need not exist yet."""

    async def check_port(self, port: int) -> None:
        """Raise Conflict if a new process cannot listen on `port`."""

    async def launch(self, spec: ProcessSpec) -> str | None:
        """Start a process and return its address, or None if `spec.port` is None.

        The launcher opens the listening socket and passes it to the process, so that no other program can take the port.
        Raises Conflict if the process is already running or its port is taken. Raises OSError if the process cannot be
        started, and TimeoutError if the result of the start is not known.
        """

    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]:
        """Return the observation of each process, by handle. Processes that could not be observed are omitted."""

    async def signal(self, handle: str, signal: Signal) -> None:
        """Send a signal to a process, unless it has exited. Raises OSError if the process cannot be observed."""
