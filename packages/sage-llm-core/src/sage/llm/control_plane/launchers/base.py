"""The launcher interface: what the control plane needs from the place where processes run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sage.common.processes import ProcessSpec

#: Arguments of ProcessSpec.argv that `launch` replaces by the port, and by the descriptor of the listening socket.
PORT_ARGUMENT, DESCRIPTOR_ARGUMENT = "{port}", "{descriptor}"


class Signal(StrEnum):
    """How a process is asked to end."""

    STOP = "stop"  #: SIGTERM to the process, which saves its state first; a suspended process is continued
    KILL = "kill"  #: SIGKILL to the process and its whole session


@dataclass(frozen=True)
class ProcessObservation:
    """A process as it was observed."""

    alive: bool
    leftovers: bool = False  #: the process is gone, but other processes of its session are not
    address: str | None = None  #: HOST:PORT on which it listens
    pid: int | None = None  #: None if it is gone or its PID is not known
    memory_bytes: int | None = None  #: resident memory of its session
    exit_code: int | None = None  #: negative: a signal; None if it is alive or its exit code is not known


class Launcher(Protocol):
    """A place where processes run; they outlive the control plane."""

    def handle(self, spec: ProcessSpec) -> str:
        """Return the name of a process for `observe` and `signal`; known before the launch, and without effect."""

    async def check_port(self, port: int) -> None:
        """Raise Conflict if a process could not listen on a port."""

    async def launch(self, spec: ProcessSpec) -> str | None:
        """Start a process and return its address, or None if `spec.port` is None.

        The launcher listens first and hands the socket over, so that no other program can get the port in between.
        Raises Conflict if the process already runs or its port is taken, OSError if it cannot be started.
        """

    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]:
        """Return what is observed; handles of processes that could not be observed are missing."""

    async def signal(self, handle: str, signal: Signal) -> None:
        """Send a signal; a process that is gone is ignored. Raises OSError if the process cannot be observed."""
