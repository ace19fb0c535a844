"""Decide which waiting engines get memory on which devices, and which engines are paused to make room.

Some waiting engines fit only after training runs have ended. Memory is reserved for the first of these engines, so that
smaller engines cannot delay this engine forever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from sage.llm.client.types import OnBusy


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that the engines of this node may use on one device."""

    id: str  #: `cpu` or, for example, `cuda:0`
    usable_bytes: int  #: the total memory or the lowest limit that applies, whichever is smaller
    foreign_bytes: int = 0  #: memory that other programs use
    #: key: id of a server of this node; value: memory that the server uses
    used_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Holder:
    """A server that has memory, or a waiting engine to which this call of `admit` gives memory."""

    engine_id: str  #: id of the server or of the engine
    memory_bytes: int  #: reserved memory on each of `devices`
    devices: tuple[str, ...]
    priority: int = 0
    is_pausable: bool = False  #: True: the engines on the server may be paused to make room
    ends: bool = False  #: True: a training run, which frees its memory when the run ends
    is_leaving: bool = False  #: True: the server or its engines are stopping; the memory is still used
    is_asleep: bool = False  #: True: a sleeping server, which may be ended to make room
    used_bytes: Mapping[str, int] = field(default_factory=dict)  #: key: device id; value: measured memory

    def bytes_on(self, device_id: str) -> int:
        """Return the reserved memory or the measured memory on a device, whichever is larger."""
        return max(self.memory_bytes if device_id in self.devices else 0, self.used_bytes.get(device_id, 0))


@dataclass(frozen=True)
class Claim:
    """A waiting engine."""

    engine_id: str
    memory_bytes: int  #: memory that the engine needs on each device
    least_bytes: int | None = None  #: smallest memory with which the engine can run; None: `memory_bytes`
    device_count: int = 1
    devices: tuple[str, ...] | None = None  #: ids of the devices that the engine may use; None: any device
    priority: int = 0
    on_busy: OnBusy = OnBusy.WAIT
    wakes: str | None = None  #: id of the sleeping server that the engine wakes
    is_due: bool = True  #: False: the engine's start time or next restart is in the future
    #: True: other engines were paused for this engine, or this engine restarts. `admit` handles such engines first.
    has_room: bool = False

    @property
    def smallest_bytes(self) -> int:
        """The smallest memory with which the engine may start now."""
        return self.memory_bytes if self.least_bytes is None or self.on_busy is not OnBusy.SHARE else self.least_bytes

    def after_pause(self) -> "Claim":
        """Return the claim for an engine that was paused: `on_busy` becomes `wait`, except that `share` is kept."""
        return self if self.on_busy is OnBusy.SHARE else replace(self, on_busy=OnBusy.WAIT)


@dataclass(frozen=True)
class Start:
    """Start the engine on these devices."""

    devices: tuple[str, ...]
    memory_bytes: int  #: memory to reserve on each device


@dataclass(frozen=True)
class MakeRoom:
    """Pause the engines on some servers, or end sleeping servers, so that the waiting engine can start afterwards."""

    pause: tuple[str, ...]  #: ids of the servers
    devices: tuple[str, ...]  #: the devices on which the waiting engine can then start


class Cause(StrEnum):
    """Why an engine waits, or why it cannot start."""

    NOT_DUE = "not_due"  #: the engine's start time or next restart is in the future
    ROOM = "room"  #: engines that must make room for this engine are stopping
    MEMORY = "memory"  #: too little memory is free
    RESERVED = "reserved"  #: enough memory is free, but it is reserved for an engine ahead in the queue
    TOO_LARGE = "too_large"  #: the engine needs more memory than the devices have
    NO_DEVICE = "no_device"  #: the node does not have the requested devices


@dataclass(frozen=True)
class Wait:
    """The engine waits."""

    position: int  #: place in the queue; the first place is 1
    cause: Cause
    free_bytes: int = 0  #: free memory of the allowed device with the most free memory


@dataclass(frozen=True)
class Refuse:
    """The engine cannot start."""

    cause: Cause
    free_bytes: int = 0  #: `TOO_LARGE`: usable memory of the largest allowed device; `MEMORY`: as in `Wait`; `NO_DEVICE`: 0


Decision = Start | MakeRoom | Wait | Refuse


@dataclass
class _Device:
    id: str
    usable_bytes: int
    free_bytes: int
    soon_bytes: int = 0  #: reserved for engines that start when the stopping engines have exited
    later_bytes: int = 0  #: reserved for the engine that starts when training runs have ended
    holders: list[Holder] = field(default_factory=list)

    @property
    def leaving_bytes(self) -> int:
        return sum(holder.bytes_on(self.id) for holder in self.holders if holder.is_leaving)

    @property
    def ending_bytes(self) -> int:
        return sum(holder.bytes_on(self.id) for holder in self.holders if holder.ends and not holder.is_leaving)

    @property
    def room_later_bytes(self) -> int:
        """Unreserved memory after all training runs and stopping engines have exited."""
        return self.free_bytes + self.leaving_bytes + self.ending_bytes - self.soon_bytes - self.later_bytes

    @property
    def room_soon_bytes(self) -> int:
        """Unreserved memory after the stopping engines have exited."""
        return min(self.free_bytes + self.leaving_bytes - self.soon_bytes, self.room_later_bytes)

    @property
    def room_bytes(self) -> int:
        """Memory that an engine may take now without delaying an engine that has a reservation."""
        return min(self.free_bytes, self.room_soon_bytes)


def admit(devices: Sequence[DeviceMemory], holders: Sequence[Holder], waiting: Sequence[Claim]) -> dict[str, Decision]:
    """Return a decision for each waiting engine. Keys: engine ids.

    waiting: the engines in the order of the queue.
    """
    state = _State(devices, holders)
    queue = sorted(enumerate(waiting, start=1), key=lambda entry: not entry[1].has_room)
    return {claim.engine_id: state.decide(position, claim) for position, claim in queue}


class _State:
    def __init__(self, devices: Sequence[DeviceMemory], holders: Sequence[Holder]) -> None:
        self._devices = {
            each.id: _Device(each.id, each.usable_bytes, each.usable_bytes - each.foreign_bytes) for each in devices
        }
        self._has_reservation = False
        for holder in holders:
            self._place(holder)

    def decide(self, position: int, claim: Claim) -> Decision:
        """Return the decision for one engine, and take or reserve the memory for this engine."""
        allowed = {key: device for key, device in self._devices.items() if claim.devices is None or key in claim.devices}
        most_free = max((device.free_bytes for device in allowed.values()), default=0)
        if len(allowed) < claim.device_count:
            return Refuse(Cause.NO_DEVICE)
        if sum(device.usable_bytes >= claim.smallest_bytes for device in allowed.values()) < claim.device_count:
            return Refuse(Cause.TOO_LARGE, max(device.usable_bytes for device in allowed.values()))
        if not claim.is_due:
            if claim.has_room:
                self._reserve_soon(claim, allowed)
            return Wait(position, Cause.NOT_DUE, most_free)
        if start := self._start(claim, allowed):
            return start
        if claim.on_busy is OnBusy.FAIL:
            return Refuse(Cause.MEMORY, most_free)
        if self._reserve_soon(claim, allowed):
            return Wait(position, Cause.ROOM, most_free)
        if room := self._make_room(claim, allowed):
            return room
        is_free = sum(device.free_bytes >= claim.smallest_bytes for device in allowed.values()) >= claim.device_count
        self._reserve_later(claim, allowed)
        return Wait(position, Cause.RESERVED if is_free else Cause.MEMORY, most_free)

    def _start(self, claim: Claim, allowed: Mapping[str, _Device]) -> Start | None:
        """Among the devices with room for `memory_bytes`, place the engine on those with the least room.

        If there are too few such devices and `on_busy` is `share`, use the devices with the most room. The engine is not
        placed if one of these devices has no room for `smallest_bytes`.
        """
        rooms = {key: device.room_bytes for key, device in allowed.items()}
        keys = _choose(claim, rooms, claim.memory_bytes)
        if not keys and claim.smallest_bytes < claim.memory_bytes:
            most = sorted(rooms, key=lambda key: (-rooms[key], key))[: claim.device_count]
            keys = tuple(most) if all(rooms[key] >= claim.smallest_bytes for key in most) else ()
        if not keys:
            return None
        memory_bytes = min(claim.memory_bytes, *(rooms[key] for key in keys))
        self._place(Holder(claim.engine_id, memory_bytes, keys, claim.priority))
        return Start(keys, memory_bytes)

    def _reserve_soon(self, claim: Claim, allowed: Mapping[str, _Device]) -> bool:
        """Reserve devices on which the engine fits after the stopping engines exit. Return False if there are too few."""
        keys = _choose(claim, {key: device.room_soon_bytes for key, device in allowed.items()}, claim.smallest_bytes)
        for key in keys:
            allowed[key].soon_bytes += min(claim.memory_bytes, allowed[key].room_soon_bytes)
        return bool(keys)

    def _reserve_later(self, claim: Claim, allowed: Mapping[str, _Device]) -> None:
        """Reserve devices on which the engine fits after training runs end. Only one engine gets this reservation."""
        if self._has_reservation:
            return
        keys = _choose(claim, {key: device.room_later_bytes for key, device in allowed.items()}, claim.memory_bytes)
        for key in keys:
            allowed[key].later_bytes += claim.memory_bytes
        self._has_reservation = bool(keys)

    def _make_room(self, claim: Claim, allowed: Mapping[str, _Device]) -> MakeRoom | None:
        """Choose and reserve the devices on which the fewest servers must be paused or ended."""
        options = []
        for key, device in allowed.items():
            paused = _to_pause(claim, device)
            if paused is not None:
                options.append((len(paused), sum(holder.bytes_on(key) for holder in paused), key, paused))
        if len(options) < claim.device_count:
            return None
        chosen = sorted(options, key=lambda option: option[:3])[: claim.device_count]
        paused_ids = tuple(dict.fromkeys(holder.engine_id for *_, paused in chosen for holder in paused))
        for device in self._devices.values():
            device.holders = [
                replace(holder, is_leaving=True) if holder.engine_id in paused_ids else holder for holder in device.holders
            ]
        keys = tuple(key for _, _, key, _ in chosen)
        for key in keys:
            allowed[key].soon_bytes += claim.memory_bytes
        return MakeRoom(paused_ids, keys)

    def _place(self, holder: Holder) -> None:
        for key, device in self._devices.items():
            if key in holder.devices or key in holder.used_bytes:
                device.free_bytes -= holder.bytes_on(key)
                device.holders.append(holder)


def _choose(claim: Claim, rooms: Mapping[str, int], need_bytes: int) -> tuple[str, ...]:
    """Among the devices with room for `need_bytes`, return those with the least room. Return () if there are too few."""
    fitting = sorted((key for key, room in rooms.items() if room >= need_bytes), key=lambda key: (rooms[key], key))
    return tuple(fitting[: claim.device_count]) if len(fitting) >= claim.device_count else ()


def _may_pause(claim: Claim, holder: Holder) -> bool:
    if holder.is_asleep:
        return holder.engine_id != claim.wakes
    return holder.is_pausable and claim.on_busy is OnBusy.PREEMPT and holder.priority <= claim.priority


def _to_pause(claim: Claim, device: _Device) -> list[Holder] | None:
    """Return the servers to pause or end so that the claim fits on a device, or None if too little memory becomes free."""
    missing_bytes = claim.memory_bytes - device.room_soon_bytes
    paused: list[Holder] = []
    candidates = (holder for holder in device.holders if _may_pause(claim, holder) and not holder.is_leaving)
    for holder in sorted(candidates, key=lambda holder: (holder.priority, -holder.bytes_on(device.id), holder.engine_id)):
        if missing_bytes > 0:
            paused.append(holder)
            missing_bytes -= holder.bytes_on(device.id)
    if missing_bytes > 0:
        return None
    for holder in sorted(paused, key=lambda holder: (-holder.priority, -holder.bytes_on(device.id))):
        if missing_bytes + holder.bytes_on(device.id) <= 0:
            paused.remove(holder)
            missing_bytes += holder.bytes_on(device.id)
    return paused
