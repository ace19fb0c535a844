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

    STOP = "stop"  #: SIGTERM to the process, which saves its state and exits; also continues a suspended process
    KILL = "kill"  #: SIGKILL to the process and its whole session


@dataclass(frozen=True)
class ProcessObservation:
    """The result of observing a process."""

    alive: bool
    leftovers: bool = False  #: the process is gone, but other processes of its session are alive
    address: str | None = None  #: HOST:PORT on which the process listens
    pid: int | None = None  #: None: the process is gone, or its PID is not known
    memory_bytes: int | None = None  #: resident memory of all processes of the session
    exit_code: int | None = None  #: -N: the process was killed by signal N; None: alive, or not known


class Launcher(Protocol):
    """Starts, observes and signals processes, which outlive the control plane."""

    def handle(self, spec: ProcessSpec) -> str:
        """Return the identifier of a process for `observe` and `signal`. Works before the launch, without side effects."""

    async def check_port(self, port: int) -> None:
        """Raise Conflict if a process cannot listen on a port."""

    async def launch(self, spec: ProcessSpec) -> str | None:
        """Start a process and return its address, or None if `spec.port` is None.

        The launcher opens the listening socket and passes it to the process, so that no other program can take the port.
        Raises Conflict if the process is already running or its port is taken, OSError if the process cannot be started.
        Raises TimeoutError if the result of the start is not known.
        """

    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]:
        """Return the observations by handle; the handle of a process that could not be observed is missing."""

    async def signal(self, handle: str, signal: Signal) -> None:
        """Send a signal; a process that is gone is ignored. Raises OSError if the process cannot be observed."""
