"""List the devices of this node, and measure their memory for admission."""

import contextlib
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from sage.common.cgroups import MemoryLimit, memory_limits
from sage.common.errors import EngineError
from sage.common.identity import all_sessions
from sage.common.settings import Settings
from sage.llm.client.types import Device, DeviceEngine
from sage.llm.control_plane.admission import DeviceMemory
from sage.llm.control_plane.inventory.gpus import Gpu, fake_gpus, list_gpus

_CPU = "cpu"


@dataclass(frozen=True)
class Occupant:
    """A server process of this node, with the id and the name of the first engine that the process hosts."""

    engine_id: str
    engine_name: str
    pid: int | None
    memory_bytes: int | None  #: main memory of the process
    devices: tuple[str, ...]  #: ids of the devices on which memory is reserved
    reserved_bytes: int | None  #: memory reserved on each device in `devices`


class Inventory:
    """The devices of this node."""

    def __init__(self, settings: Settings) -> None:
        self._fake_devices = settings.fake_devices
        self._limit_bytes = None if settings.memory_limit_gb is None else round(settings.memory_limit_gb * 1e9)

    def devices(self, occupants: Sequence[Occupant] = ()) -> list[Device]:
        """Return all devices, GPUs first, main memory last.

        Each device lists the engines that use its memory, and the engines for which its memory is reserved.
        """
        node, sessions = socket.gethostname(), all_sessions()
        members = {each.engine_id: _members([each.pid] if each.pid else [], sessions) for each in occupants}
        gpus = []
        for gpu in self._gpus():
            used_bytes = {engine_id: gpu.bytes_of(pids) for engine_id, pids in members.items()}
            engines = _engines(_cuda(gpu), occupants, used_bytes)
            usable_bytes = gpu.memory_total_bytes
            gpus.append(Device(node=node, kind="cuda", memory_usable_bytes=usable_bytes, engines=engines, **vars(gpu)))
        memory = psutil.virtual_memory()
        main = Device(
            node=node,
            kind=_CPU,
            index=0,
            name="main memory",
            memory_total_bytes=memory.total,
            memory_usable_bytes=self._main_memory(own_bytes=0).usable_bytes,
            memory_used_bytes=memory.total - memory.available,
            utilization_percent=psutil.cpu_percent(),
            engines=_engines(_CPU, occupants, {occupant.engine_id: occupant.memory_bytes or 0 for occupant in occupants}),
        )
        return [*gpus, main]

    def memory(self, pids: Mapping[str, int]) -> list[DeviceMemory]:
        """Return the memory of each device: usable, used by each server, and used by other programs.

        pids: maps the id of each server of this node to the PID of the server's process. The memory of a server includes all
        processes in the session of the server's process.
        """
        sessions = all_sessions()
        members = {server_id: _members([pid], sessions) for server_id, pid in pids.items()}
        gpus = []
        for gpu in self._gpus():
            used_bytes = {server_id: used for server_id, own in members.items() if (used := gpu.bytes_of(own))}
            foreign_bytes = max(0, gpu.memory_used_bytes - sum(used_bytes.values()))
            gpus.append(DeviceMemory(_cuda(gpu), gpu.memory_total_bytes, foreign_bytes, used_bytes))
        used_bytes = {server_id: _private_bytes(own) for server_id, own in members.items()}
        return [replace(self._main_memory(sum(used_bytes.values())), used_bytes=used_bytes), *gpus]

    def variables(self, devices: Collection[str]) -> Mapping[str, str]:
        """Return the environment variables that restrict a process to some of the node's devices.

        devices: ids of devices. If `devices` is empty, the process may use all devices. If `devices` contains only the CPU
        or fake GPUs, the process can use only the CPU. Raises EngineError if a device does not exist.
        """
        gpus = {_cuda(gpu): gpu for gpu in self._gpus()}
        if missing := set(devices) - {_CPU, *gpus}:
            raise EngineError(
                code="device_not_found",
                message=f"This node does not have the devices {', '.join(sorted(missing))}.",
                hint="`sage gpu` shows the devices.",
            )
        if not devices or not gpus:
            return {}
        visible = [gpu.selector for key, gpu in gpus.items() if key in devices and gpu.selector]
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(visible)}

    def _gpus(self) -> list[Gpu]:
        return fake_gpus(self._fake_devices) if self._fake_devices else list_gpus()

    def _main_memory(self, own_bytes: int) -> DeviceMemory:
        memory = psutil.virtual_memory()
        bounds = [MemoryLimit(memory.total, memory.total - memory.available), *memory_limits()]
        return within(_CPU, bounds, own_bytes, self._limit_bytes)


def within(device: str, bounds: Sequence[MemoryLimit], own_bytes: int, limit_bytes: int | None) -> DeviceMemory:
    """Return the memory of a device to which several bounds apply at the same time.

    own_bytes: the memory that engines use. `used_bytes` of each bound includes these bytes.
    limit_bytes: the memory that all engines together may use. None: no limit.
    """
    limits = [bound.limit_bytes for bound in bounds]
    rooms = [bound.limit_bytes - max(0, bound.used_bytes - own_bytes) for bound in bounds]
    if limit_bytes is not None:
        limits.append(limit_bytes)
        rooms.append(limit_bytes)
    return DeviceMemory(device, min(limits), max(0, min(limits) - min(rooms)))


def _engines(device: str, occupants: Sequence[Occupant], used_bytes: Mapping[str, int]) -> list[DeviceEngine]:
    found = []
    for occupant in occupants:
        reserved_bytes = occupant.reserved_bytes if device in occupant.devices else None
        if used_bytes[occupant.engine_id] or reserved_bytes:
            found.append(
                DeviceEngine(
                    id=occupant.engine_id,
                    name=occupant.engine_name,
                    memory_bytes=used_bytes[occupant.engine_id],
                    reserved_bytes=reserved_bytes,
                )
            )
    return found


def _members(pids: Collection[int], sessions: Mapping[int, Collection[int]]) -> set[int]:
    return {member for pid in pids for member in sessions.get(pid, [pid])}


def _cuda(gpu: Gpu) -> str:
    return f"cuda:{gpu.index}"


def _private_bytes(pids: Collection[int]) -> int:
    """Return the resident memory of processes without shared pages. The system does not count shared pages as used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            total += memory.rss - getattr(memory, "shared", 0)  # `shared` exists only on Linux
    return total
