"""Order the waiting engines, decide what each waiting engine should do, and report why an engine waits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sage.libs.finetune.run.estimate import gigabytes
from sage.llm.client.types import DesiredState, EngineKind, EngineState, Reason
from sage.llm.control_plane.admission import (
    Cause,
    Claim,
    Decision,
    DeviceMemory,
    Holder,
    MakeRoom,
    Refuse,
    Start,
    Wait,
    admit,
)
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.hosting import Hosts
from sage.llm.control_plane.idle import is_making_room
from sage.llm.control_plane.restarts import backoff_seconds
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.watch import Watch


@dataclass(frozen=True)
class Memory:
    """The memory of the node's devices at the time `now`."""

    devices: Sequence[DeviceMemory]
    now: datetime


@dataclass(frozen=True)
class Queue:
    """What each waiting engine should do."""

    joins: Mapping[str, ServerRecord] = field(default_factory=dict)
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    #: key: id of a waiting engine; value: the sleeping server to wake if the engine can start
    wakes: Mapping[str, ServerRecord] = field(default_factory=dict)
    #: key: id of an engine to pause; value: id of the waiting engine that needs the memory
    pauses: Mapping[str, str] = field(default_factory=dict)
    evicted: frozenset[str] = frozenset()  #: ids of sleeping servers to end, because their memory is needed
    #: key: engine id; value: why no action could be planned for the engine
    errors: dict[str, Exception] = field(default_factory=dict)

    def reason(self, engine: EngineRecord) -> Reason | None:
        """Return why an engine waits or cannot start, or None if no reason is known."""
        decision = self.decisions.get(engine.id)
        return _reason(engine, decision) if isinstance(decision, Wait | Refuse) else None


def is_waiting(engine: EngineRecord) -> bool:
    """Return whether an engine is in the queue."""
    if engine.state is EngineState.QUEUED:
        return engine.desired is DesiredState.RUNNING
    return engine.state is EngineState.PAUSED and is_making_room(engine)


def rank(engine: EngineRecord) -> tuple[int, float]:
    """Return the sort key of an engine in the queue."""
    return -engine.priority, engine.last_event if engine.queue_rank is None else engine.queue_rank


def rank_at(engine: EngineRecord, position: int, waiting: Sequence[EngineRecord]) -> float:
    """Return the `queue_rank` that moves an engine to a position in the queue.

    The engine moves to `position`, or to the nearest position that the engine's priority allows. The first position is 1.
    waiting: all waiting engines, in the order of the queue.
    """
    others = [other for other in waiting if other.id != engine.id]
    ahead = sum(other.priority > engine.priority for other in others)
    ranks = [rank(other)[1] for other in others if other.priority == engine.priority]
    index = min(max(position - 1 - ahead, 0), len(ranks))
    match ranks[:index], ranks[index:]:
        case [], []:
            return rank(engine)[1]
        case [], [after, *_]:
            return after - 1
        case [*_, before], []:
            return before + 1
        case [*_, before], [after, *_]:
            return (before + after) / 2
    raise AssertionError


def queue_of(
    engines: Sequence[EngineRecord],
    servers: Iterable[ServerRecord],
    watches: Mapping[str, Watch],
    hosts: Hosts,
    memory: Memory | None,
) -> Queue:
    """Return what each waiting engine should do.

    memory: None if the devices are not known. In this case, no engine waits for memory.
    """
    joins: dict[str, ServerRecord] = {}
    claims: list[Claim] = []
    wakes: dict[str, ServerRecord] = {}
    room_for = {engine.paused_by for engine in engines if is_making_room(engine)}
    # Engines that restart get memory first. Otherwise, another engine could get the memory that a restarting engine had.
    room_for |= {engine.id for engine in engines if engine.restarts and not engine.paused_by}
    for engine in sorted(filter(is_waiting, engines), key=rank):
        is_due = watches[engine.id].state_seconds >= backoff_seconds(engine.restarts)
        if not is_due or (memory and engine.not_before and engine.not_before > memory.now):
            claims.append(_claim(engine, memory, is_due=False, has_room=engine.id in room_for))
        elif server := hosts.server_for(engine):
            joins[engine.id] = server
        elif not hosts.must_wait(engine):
            hosts.launches(engine)
            claim = _claim(engine, memory, is_due=True, has_room=engine.id in room_for)
            if asleep := hosts.asleep_for(engine):
                wakes[engine.id] = asleep
                claim = _to_wake(claim, asleep)
            claims.append(claim)
    if memory is None:
        return Queue(joins, {claim.engine_id: Start((), claim.memory_bytes) for claim in claims if claim.is_due}, wakes)
    decisions = admit(memory.devices, list(_holders(servers, hosts, memory)), claims)
    paused = [(key, server_id) for key, room in decisions.items() if isinstance(room, MakeRoom) for server_id in room.pause]
    pauses = {engine.id: claim_id for claim_id, server_id in paused for engine in hosts.engines_on(server_id)}
    woken = {wakes[engine_id].id for engine_id, each in decisions.items() if isinstance(each, Start) and engine_id in wakes}
    evicted = {server_id for _, server_id in paused if not hosts.engines_on(server_id)} - woken
    chosen = {server_id for _, server_id in paused}
    joins = {engine_id: server for engine_id, server in joins.items() if server.id not in chosen}
    return Queue(joins, decisions, wakes, pauses, frozenset(evicted))


def _claim(engine: EngineRecord, memory: Memory | None, *, is_due: bool, has_room: bool) -> Claim:
    devices = _usable(engine, memory) if memory else engine.devices
    need_bytes = engine.reserved_bytes or 0
    if engine.least_bytes is not None and memory:
        # A training run can use smaller batches, so it does not wait for memory that other programs use.
        rooms = (device.usable_bytes - device.foreign_bytes for device in memory.devices if device.id in (devices or ()))
        largest_bytes = max(rooms, default=0)
        need_bytes = min(need_bytes, max(engine.least_bytes, largest_bytes))
    claim = Claim(
        engine.id,
        need_bytes,
        engine.least_bytes,
        devices=devices,
        priority=engine.priority,
        on_busy=engine.on_busy,
        is_due=is_due,
        has_room=has_room,
    )
    return claim.after_pause() if engine.paused_by else claim


def _to_wake(claim: Claim, asleep: ServerRecord) -> Claim:
    """Return the claim for the memory that a sleeping server needs in addition to the memory that it still has."""
    kept_bytes = asleep.reserved_bytes or 0
    return replace(
        claim, memory_bytes=max(0, claim.memory_bytes - kept_bytes), devices=asleep.devices, wakes=asleep.id
    )  # fmt: skip


def _usable(engine: EngineRecord, memory: Memory) -> tuple[str, ...]:
    if engine.devices:
        return engine.devices
    gpus = tuple(device.id for device in memory.devices if device.id != "cpu")
    backend = registry.BACKENDS.get(engine.backend)  # None if another version of SAGE added the engine
    return gpus if gpus and backend and "cuda" in backend.capabilities.devices else ("cpu",)


def _holders(servers: Iterable[ServerRecord], hosts: Hosts, memory: Memory) -> Iterator[Holder]:
    for server in servers:
        engines = hosts.engines_on(server.id)
        devices = server.devices or (_usable(engines[0], memory)[:1] if engines else ("cpu",))
        is_asleep = server.state is ServerState.SLEEPING and not engines
        staying = [
            engine.state
            for engine in engines
            if engine.desired is DesiredState.RUNNING and engine.state is not EngineState.STOPPING
        ]
        is_training = any(engine.kind is EngineKind.FINETUNE for engine in engines)
        yield Holder(
            server.id,
            server.reserved_bytes or 0,
            devices,
            priority=max((engine.priority for engine in engines), default=0),
            is_asleep=is_asleep,
            is_pausable=not is_training and all(state is EngineState.RUNNING for state in staying),
            ends=is_training,
            is_leaving=not is_asleep and (server.state is ServerState.CLOSING or not staying),
            used_bytes={each.id: each.used_bytes[server.id] for each in memory.devices if server.id in each.used_bytes},
        )


def _reason(engine: EngineRecord, decision: Wait | Refuse) -> Reason:
    need, free = gigabytes(engine.reserved_bytes or 0), gigabytes(max(0, decision.free_bytes))
    place = f"Number {decision.position} in the queue: " if isinstance(decision, Wait) else ""
    hint = ""
    match decision.cause:
        case Cause.NOT_DUE if engine.not_before:
            text = f"the engine starts at {engine.not_before:%Y-%m-%d %H:%M} UTC or later."
        case Cause.NOT_DUE:
            text = "the engine waits before the next attempt to start."
        case Cause.ROOM:
            text = f"the engine needs {need} of memory, and the engines that make room for it are stopping."
        case Cause.MEMORY:
            text = f"the engine needs {need} of memory, and {free} are free."
            hint = "`--on-busy preempt` pauses inference engines; `sage llm engine list` shows the running engines."
        case Cause.RESERVED:
            text = f"the engine needs {need} of memory, and the free memory is reserved for an engine ahead in the queue."
        case Cause.TOO_LARGE:
            text = f"the engine needs {need} of memory, and the largest device has {free}."
            hint = "Use a smaller model, or set --memory-gb if the engine needs less than the estimate."
        case Cause.NO_DEVICE:
            text = f"this node does not have the devices {', '.join(engine.devices or ())}."
            hint = "`sage gpu` shows the devices."
    message = place + text if place else text[0].upper() + text[1:]
    return Reason(code=_CODES[decision.cause], message=message, hint=hint)


_CODES = {
    Cause.NOT_DUE: "not_due",
    Cause.ROOM: "making_room",
    Cause.MEMORY: "memory_busy",
    Cause.RESERVED: "memory_reserved",
    Cause.TOO_LARGE: "memory_too_small",
    Cause.NO_DEVICE: "device_not_found",
}
