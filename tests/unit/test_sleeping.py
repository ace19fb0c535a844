"""Servers that sleep to make room: the plan, the requests to the server, and what is stored."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from sleeping_server import SleepingServer, sleeping_server
from store_promises import lease_of

from sage.common.server_keys import server_key
from sage.llm.client.types import DesiredState, EngineState, OnBusy
from sage.llm.control_plane.actions import Join, SendSignal, Sleep, Transition, Wake
from sage.llm.control_plane.admission import Claim, DeviceMemory, Holder, MakeRoom, Start, Wait, admit
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import ProcessObservation, Signal
from sage.llm.control_plane.plan import Limits, Snapshot, decide
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.queueing import Memory, Queue
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.sleeper import Sleeper
from sage.llm.control_plane.sleeping import unneeded
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.watch import Watch

S, PAUSED = EngineState, DesiredState.PAUSED
GB = 10**9
ALIVE, DEAD = Observed(alive=True, ready=True), Observed(alive=False)


def engine(state: EngineState, desired: DesiredState = DesiredState.RUNNING, **values: Any) -> EngineRecord:
    """Return an engine of the backend vLLM. If its desired state is paused, it makes room for `engine-t`."""
    fields = {"backend": "vllm", "server_id": "server-a", "reserved_bytes": 8 * GB, "base": "/m", "paused_by": None}
    if desired is PAUSED:
        fields["paused_by"] = "engine-t"
    return record(state, desired, **{**fields, **values})


def host(state: ServerState, **values: Any) -> ServerRecord:
    fields = {"backend": "vllm", "model": "/m", "options": {}, "shared": True, "devices": ("cuda:0",)}
    fields["reserved_bytes"] = 8 * GB
    return server(state, **{**fields, **values})


def planned(
    *engines: EngineRecord, of: ServerRecord, observed: Observed | None = ALIVE, memory_gb: int = 10, seconds: float = 0
) -> tuple[list[Any], Queue]:
    watches = {each.id: Watch(each.state, state_seconds=seconds) for each in engines}
    seen = {each.id: observed for each in engines if observed and each.server_id == of.id}
    memory = Memory([DeviceMemory("cpu", memory_gb * GB), DeviceMemory("cuda:0", memory_gb * GB)], of.created_at)
    return decide(Snapshot(engines, {of.id: of}, seen, watches, {}, Limits(300, 20), memory))


@pytest.mark.parametrize(
    ("paused_by", "devices", "backend", "state", "action"),
    [
        ("engine-t", ("cuda:0",), "vllm", ServerState.LAUNCHED, Sleep),
        ("engine-t", ("cuda:0",), "vllm", ServerState.SLEEPING, Sleep),  # the request is repeated after a crash
        ("engine-t", ("cuda:0",), "vllm", ServerState.CLOSING, SendSignal),  # the server could not sleep
        ("engine-t", ("cpu",), "vllm", ServerState.LAUNCHED, SendSignal),
        ("engine-t", ("cuda:0",), "transformers", ServerState.LAUNCHED, SendSignal),
        ("user", ("cuda:0",), "vllm", ServerState.LAUNCHED, SendSignal),
        ("idle", ("cuda:0",), "vllm", ServerState.LAUNCHED, SendSignal),
    ],
)
def test_a_server_of_vllm_on_a_gpu_sleeps_to_make_room(
    paused_by: str, devices: tuple[str, ...], backend: str, state: ServerState, action: type
) -> None:
    stopping = engine(S.STOPPING, PAUSED, paused_by=paused_by, backend=backend, last_request_at=None)
    ((planned_action,), _) = planned(stopping, of=host(state, devices=devices, backend=backend))
    assert type(planned_action) is action


def test_a_server_that_does_not_sleep_in_time_is_killed() -> None:
    ((action,), _) = planned(engine(S.STOPPING, PAUSED), of=host(ServerState.SLEEPING), seconds=21)
    assert (type(action), action.signal) == (SendSignal, Signal.KILL)


def test_a_paused_engine_wakes_its_server_when_the_rest_of_its_memory_is_free() -> None:
    asleep = host(ServerState.SLEEPING, reserved_bytes=1 * GB)
    ((action,), _) = planned(engine(S.PAUSED, PAUSED), of=asleep)
    assert action.desired is DesiredState.RUNNING
    ((action,), _) = planned(engine(S.QUEUED), of=asleep)
    assert (type(action), action.reserved_bytes) == (Join, 8 * GB)
    ((action,), _) = planned(engine(S.QUEUED), of=asleep, memory_gb=8)
    assert type(action) is Join
    assert planned(engine(S.PAUSED, PAUSED), of=asleep, memory_gb=7)[0] == []
    starting = engine(S.STARTING)
    ((action,), _) = planned(starting, of=host(ServerState.WAKING))
    assert type(action) is Wake
    ((action,), _) = planned(starting, of=host(ServerState.LAUNCHED, served_name="sage-a-1"))
    assert (type(action), action.state) == (Transition, S.RUNNING)


def test_another_engine_of_the_same_base_wakes_the_server() -> None:
    new = engine(S.QUEUED, id="engine-new", server_id=None, adapter="/adapter")
    ((action,), _) = planned(new, of=host(ServerState.SLEEPING, reserved_bytes=1 * GB))
    assert (type(action), action.server.id) == (Join, "server-a")


def test_an_engine_does_not_return_to_a_server_that_is_still_falling_asleep() -> None:
    left = engine(S.PAUSED, PAUSED, id="engine-b", adapter="/adapter")
    falling = host(ServerState.SLEEPING)  # the memory that the server releases is still reserved
    room = planned(left, engine(S.STOPPING, PAUSED), of=falling, memory_gb=10)[1]
    assert (room.wakes, type(room.decisions[left.id])) == ({}, Wait)


def test_an_engine_does_not_return_to_a_server_that_is_about_to_be_paused() -> None:
    left, base = engine(S.PAUSED, PAUSED, id="engine-b", adapter="/adapter"), engine(S.RUNNING)
    needs = engine(S.QUEUED, id="engine-t", server_id=None, base=None, reserved_bytes=6 * GB, on_busy=OnBusy.PREEMPT)
    actions, _ = planned(left, base, needs, of=host(ServerState.LAUNCHED))
    assert [(each.engine.id, each.desired) for each in actions] == [(base.id, PAUSED)]


def test_a_server_that_died_while_it_woke_is_started_again_whatever_the_restart_policy() -> None:
    ((action,), _) = planned(engine(S.STARTING), of=host(ServerState.WAKING, served_name="sage-a-1"), observed=DEAD)
    assert (action.state, action.restarts) == (S.FAILED, 1)


def test_a_sleeping_server_is_ended_if_no_engine_needs_it_or_it_died_or_its_memory_is_needed() -> None:
    asleep = host(ServerState.SLEEPING)
    servers, paused = {asleep.id: asleep}, engine(S.PAUSED, PAUSED)
    assert unneeded([paused], servers, {paused.id: ALIVE}, ()) == []
    assert unneeded([paused], servers, {}, ()) == []  # it is not known whether the process is alive
    assert unneeded([], servers, {}, ()) == [asleep]
    assert unneeded([paused], servers, {paused.id: DEAD}, ()) == [asleep]
    assert unneeded([paused], servers, {paused.id: ALIVE}, {asleep.id}) == [asleep]
    awake = host(ServerState.LAUNCHED)
    assert unneeded([], {awake.id: awake}, {}, ()) == []


def test_the_memory_that_a_sleeping_server_keeps_is_taken_if_an_engine_needs_it() -> None:
    asleep = Holder("server-a", 2, ("g",), is_asleep=True)
    device, other = [DeviceMemory("g", 10)], Claim("engine-b", 9)
    assert admit(device, [asleep], [Claim("engine-b", 8)]) == {"engine-b": Start(("g",), 8)}
    assert admit(device, [asleep], [other]) == {"engine-b": MakeRoom(("server-a",), ("g",))}
    failing = dataclasses.replace(other, on_busy=OnBusy.PREEMPT, priority=-5)
    assert admit(device, [asleep], [failing]) == {"engine-b": MakeRoom(("server-a",), ("g",))}
    own = dataclasses.replace(other, wakes="server-a")
    assert not isinstance(admit(device, [asleep], [own])["engine-b"], MakeRoom)
    waiting = record(S.QUEUED, id="engine-b", backend="vllm", reserved_bytes=9 * GB, priority=1)
    _, queue = planned(engine(S.PAUSED, PAUSED), waiting, of=host(ServerState.SLEEPING, reserved_bytes=2 * GB))
    assert queue.evicted == {"server-a"}


class World:
    """A store with an engine that stops to make room, and a `Sleeper` that sends requests to a real HTTP server."""

    def __init__(self, folder: Path, http: SleepingServer) -> None:
        self.store = Store(open_database(f"sqlite:///{folder}/engines.db"))
        self.lease, self.signals, self.is_alive = lease_of(self.store), list[Signal](), True
        self.routing = RoutingTable("n")
        self.sleeper = Sleeper(self.store, Pool("store", 1), self, self.routing, lambda: self.lease)  # type: ignore[arg-type]
        stopping = self.store.add(engine(S.QUEUED, PAUSED, server_id=None), "user", self.lease)
        launched = host(ServerState.LAUNCHED, address=http.address)
        started = self.move(stopping, S.STARTING, put_server=launched, server_id=launched.id)
        self.move(started, S.STOPPING)

    def move(self, each: EngineRecord, state: EngineState, **values: Any) -> EngineRecord:
        return self.store.transition(each, state, actor="r", lease=self.lease, **values)

    async def observe(self, handles: Any) -> dict[str, ProcessObservation]:
        return {handle: ProcessObservation(alive=self.is_alive) for handle in handles}

    async def signal(self, _: str, signal: Signal) -> None:
        self.signals.append(signal)

    @property
    def engine(self) -> EngineRecord:
        return self.store.get("engine-a")

    @property
    def host(self) -> ServerRecord:
        (found,) = self.store.servers("n")
        return found

    def sleep(self) -> None:
        asyncio.run(self.sleeper.act(Sleep(self.engine, self.host)))


@pytest.fixture
def http() -> Iterator[SleepingServer]:
    with sleeping_server() as server_:
        yield server_


def test_a_server_finishes_its_requests_then_sleeps_with_little_memory_and_wakes_again(
    sage_home: Path, tmp_path: Path, http: SleepingServer
) -> None:
    world = World(tmp_path, http)
    world.sleep()
    assert http.requests == ["/sleep?level=1&mode=wait", "/is_sleeping"]
    assert http.keys == {f"Bearer {server_key('engine-a')}"}
    assert (world.engine.state, world.host.state) == (S.PAUSED, ServerState.SLEEPING)
    assert world.engine.reason
    assert world.engine.reason.code == "makes_room"
    assert (world.host.reserved_bytes or 0) < 2 * GB
    queued = world.move(world.engine, S.QUEUED)
    waking = {"state": ServerState.WAKING, "reserved_bytes": 8 * GB}
    world.move(queued, S.STARTING, join_server="server-a", join_values=waking)
    asyncio.run(world.sleeper.act(Wake(world.engine, world.host)))
    assert (http.is_sleeping, world.host.state, world.host.reserved_bytes) == (False, ServerState.LAUNCHED, 8 * GB)


@pytest.mark.parametrize("problem", ["status", "ignored"])
def test_a_server_that_cannot_sleep_is_stopped(sage_home: Path, tmp_path: Path, http: SleepingServer, problem: str) -> None:
    http.fails, http.ignores = ("/sleep", False) if problem == "status" else ("", True)
    world = World(tmp_path, http)
    world.sleep()
    assert (world.engine.state, world.host.state, world.host.reserved_bytes) == (S.STOPPING, ServerState.CLOSING, 8 * GB)
    ((action,), _) = planned(world.engine, of=world.host)
    assert (type(action), action.signal) == (SendSignal, Signal.STOP)


def test_a_server_that_cannot_wake_is_killed_to_be_started_again(
    sage_home: Path, tmp_path: Path, http: SleepingServer
) -> None:
    world = World(tmp_path, http)
    world.sleep()
    http.fails = "/wake_up"
    asyncio.run(world.sleeper.act(Wake(world.engine, world.host)))
    assert world.signals == [Signal.KILL]


def test_a_server_that_does_not_answer_is_asked_again(sage_home: Path, tmp_path: Path, http: SleepingServer) -> None:
    world = World(tmp_path, http)
    http.server_close()
    with pytest.raises(OSError, match="did not answer the request to sleep"):
        world.sleep()
    assert (world.engine.state, world.host.state) == (S.STOPPING, ServerState.SLEEPING)


def test_the_row_of_a_sleeping_server_is_removed_when_its_process_has_exited(
    sage_home: Path, tmp_path: Path, http: SleepingServer
) -> None:
    world = World(tmp_path, http)
    world.sleep()
    asleep = world.host
    world.move(world.engine, S.STOPPED, leave_server=asleep.id)
    assert world.host == asleep  # its process is still alive

    async def end() -> None:
        world.sleeper.end(asleep)
        await world.sleeper.close()

    asyncio.run(end())
    assert world.signals == [Signal.KILL]
    world.is_alive = False
    asyncio.run(end())
    assert world.store.servers("n") == []
