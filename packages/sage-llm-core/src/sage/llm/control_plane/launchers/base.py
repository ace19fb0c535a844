"""The launcher: what the control plane needs of the place where a process runs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sage.common.processes import ProcessSpec


class Signal(StrEnum):
    """A signal to all processes of a server."""

    STOP = "stop"
    KILL = "kill"


@dataclass(frozen=True)
class ProcessObservation:
    """A process, as the launcher sees it."""

    alive: bool
    leftovers: bool = False
    address: str | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    exit_code: int | None = None


class Launcher(Protocol):
    """A place where processes run; they outlive the control plane."""

    def handle(self, spec: ProcessSpec) -> str: ...
    async def launch(self, spec: ProcessSpec) -> str | None: ...
    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]: ...
    async def signal(self, handle: str, signal: Signal) -> None: ...
