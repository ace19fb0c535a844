"""Decisions of the plan about engines that wait for memory or make room for other engines."""

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from engines import record, server
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.client.types import DesiredState, EngineKind, EngineState, OnBusy
from sage.llm.control_plane.actions import Action, Launch, SendSignal, SetDesired, Transition
from sage.llm.control_plane.admission import DeviceMemory
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.plan import Limits, Snapshot, decide
from sage.llm.control_plane.queueing import Memory, Queue, is_waiting, rank, rank_at
from sage.llm.control_plane.states import check_transition
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord
from sage.llm.control_plane.watch import Watch

S, PAUSED = EngineState, DesiredState.PAUSED
NOW = datetime(2030, 1, 1, tzinfo=UTC)
GB = 10**9


def engine(name: str, size_gb: int, state: EngineState = S.QUEUED, **values: Any) -> EngineRecord:
    return record(state, **{"id": f"engine-{name}", "reserved_bytes": size_gb * GB, "dedicated": True, **values})


def run(name: str, size_gb: int, **values: Any) -> EngineRecord:
    return engine(name, size_gb, kind=EngineKind.FINETUNE, backend="trainer", **values)


class Node:
    """A simulated node that executes each action at once, so that tests can follow the plan over many ticks."""

    def __init__(self, *engines: EngineRecord, memory_gb: int = 10) -> None:
        self.engines: dict[str, EngineRecord] = {}
        self.servers: dict[str, ServerRecord] = {}
        self.ended: dict[str, EngineState] = {}
        self.devices = [DeviceMemory("cpu", memory_gb * GB)]
        self.now, self.queue, self.event = NOW, Queue(), 0
        for each in engines:
            self.put(each)

    def put(self, each: EngineRecord, **values: Any) -> None:
        self.event += 1
        self.engines[each.id] = dataclasses.replace(each, **values)

    def tick(self) -> list[Action]:
        active = [each for each in self.engines.values() if each.state not in (S.STOPPED, S.COMPLETED, S.FAILED)]
        observed = {
            each.id: Observed(alive=each.id not in self.ended, ready=True, ended=self.ended.get(each.id))
            for each in active
            if each.server_id in self.servers
        }
        watches = {each.id: Watch(each.state) for each in active}
        memory = Memory(self.devices, self.now)
        actions, self.queue = decide(Snapshot(active, self.servers, observed, watches, {}, Limits(300, 20), memory))
        for action in actions:
            self.apply(action)
        assert sum(each.reserved_bytes or 0 for each in self.servers.values()) <= self.devices[0].usable_bytes
        return actions

    def apply(self, action: Action) -> None:
        each = self.engines[action.engine.id]
        match action:
            case Launch(devices=devices, reserved_bytes=reserved_bytes):
                host = server(id=f"server-{each.id[7:]}", devices=devices, reserved_bytes=reserved_bytes)
                self.servers[host.id] = host
                self.put(each, state=S.STARTING, server_id=host.id, paused_by=None, queue_rank=None)
            case SetDesired(desired=desired, paused_by=paused_by):
                kept = {"paused_by": paused_by} if paused_by else {"queue_rank": rank(each)[1]}
                self.put(each, desired=desired, **kept)
            case SendSignal():
                self.ended[each.id] = S.STOPPED if each.kind is EngineKind.FINETUNE else S.RUNNING
                if each.kind is not EngineKind.FINETUNE:
                    del self.servers[each.server_id or ""]
                    self.ended.pop(each.id)
            case Transition(state=state):
                check_transition(each.state, state)
                if state in (S.STOPPED, S.COMPLETED, S.FAILED, S.PAUSED):
                    self.servers.pop(each.server_id or "", None)
                    self.ended.pop(each.id, None)
                self.put(each, state=state, reason=action.reason, last_event=self.event)

    def settle(self) -> None:
        for _ in range(30):
            if not self.tick():
                return
        raise AssertionError("the plan still returns actions after 30 ticks")

    def states(self) -> Mapping[str, EngineState]:
        return {each.id[7:]: each.state for each in self.engines.values()}

    def end(self, name: str, state: EngineState = S.COMPLETED) -> None:
        self.ended[f"engine-{name}"] = state


def test_a_model_makes_room_for_a_run_and_returns_when_the_run_has_ended() -> None:
    node = Node(engine("a", 8))
    node.settle()
    assert node.states() == {"a": S.RUNNING}
    node.put(run("t", 6, on_busy=OnBusy.PREEMPT, last_event=5))
    node.settle()
    assert node.states() == {"a": S.PAUSED, "t": S.RUNNING}
    reason = node.engines["engine-a"].reason
    assert reason
    assert (reason.code, "engine-t" in reason.message) == ("makes_room", True)
    node.end("t")
    node.settle()
    assert node.states() == {"a": S.RUNNING, "t": S.COMPLETED}
    assert (node.engines["engine-a"].paused_by, node.engines["engine-a"].desired) == (None, DesiredState.RUNNING)


@pytest.mark.parametrize("end", [S.STOPPED, S.FAILED])
def test_the_model_also_returns_if_the_run_is_stopped_or_fails(end: EngineState) -> None:
    node = Node(engine("a", 8))
    node.settle()
    node.put(run("t", 6, on_busy=OnBusy.PREEMPT, last_event=5))
    node.settle()
    node.put(node.engines["engine-t"], desired=DesiredState.STOPPED)
    node.end("t", end)
    node.settle()
    assert node.states() == {"a": S.RUNNING, "t": end}


def test_the_model_returns_if_the_run_is_stopped_before_it_starts() -> None:
    node = Node(engine("a", 8))
    node.settle()
    node.put(run("t", 6, on_busy=OnBusy.PREEMPT, last_event=5))
    while node.states()["a"] is not S.PAUSED:
        node.tick()
    node.put(node.engines["engine-t"], desired=DesiredState.STOPPED)
    node.settle()
    assert node.states() == {"a": S.RUNNING, "t": S.STOPPED}


def test_an_engine_is_also_paused_if_another_engine_of_its_server_is_already_being_paused() -> None:
    node = Node(engine("a", 8))
    node.settle()
    first = node.engines["engine-a"]
    node.put(engine("b", 0, S.RUNNING, server_id=first.server_id, last_event=4))
    node.put(first, state=S.STOPPING, desired=PAUSED, paused_by="engine-t")
    node.put(run("t", 6, on_busy=OnBusy.PREEMPT, last_event=5))
    node.tick()
    assert node.engines["engine-b"].desired is PAUSED


def test_a_waiting_run_has_a_reason_and_starts_when_the_run_before_it_has_ended() -> None:
    node = Node(run("s", 7), run("t", 6, last_event=5))
    node.settle()
    assert node.states() == {"s": S.RUNNING, "t": S.QUEUED}
    reason = node.queue.reason(node.engines["engine-t"])
    assert reason
    assert (reason.code, reason.message) == (
        "memory_busy",
        "Number 1 in the queue: the engine needs 6.0 GB of memory, and 3.0 GB are free.",
    )
    node.end("s")
    node.settle()
    assert node.states() == {"s": S.COMPLETED, "t": S.RUNNING}


def test_an_engine_that_must_not_wait_or_can_never_fit_fails_with_the_reason() -> None:
    node = Node(engine("a", 8))
    node.settle()
    node.put(engine("b", 3, on_busy=OnBusy.FAIL))
    node.put(engine("c", 11))
    node.put(engine("d", 1, devices=("cuda:0",)))
    node.settle()
    codes = {name: node.engines[f"engine-{name}"].reason for name in "bcd"}
    assert {name: reason and reason.code for name, reason in codes.items()} == {
        "b": "memory_busy", "c": "memory_too_small", "d": "device_not_found",
    }  # fmt: skip
    assert codes["c"]
    assert codes["c"].message == "The engine needs 11.0 GB of memory, and the largest device has 10.0 GB."


def test_a_run_that_needs_more_than_all_memory_gets_all_memory_if_its_minimum_fits() -> None:
    node = Node(run("t", 12, least_bytes=4 * GB), run("u", 12, least_bytes=11 * GB))
    node.settle()
    assert node.servers["server-t"].reserved_bytes == 10 * GB
    assert node.states() == {"t": S.RUNNING, "u": S.FAILED}


def test_a_run_does_not_wait_for_memory_of_other_programs_if_its_minimum_fits() -> None:
    node = Node(run("t", 8, least_bytes=2 * GB), run("u", 8, least_bytes=7 * GB))
    node.devices = [DeviceMemory("cpu", 10 * GB, foreign_bytes=4 * GB)]
    node.settle()
    assert node.states() == {"t": S.RUNNING, "u": S.QUEUED}
    assert node.servers["server-t"].reserved_bytes == 6 * GB


def test_a_run_waits_while_another_engine_uses_more_than_it_has_reserved() -> None:
    node = Node(engine("a", 4))
    node.settle()
    node.put(run("t", 5, last_event=5))
    node.devices = [DeviceMemory("cpu", 10 * GB, used_bytes={"server-a": 6 * GB})]
    node.settle()
    assert node.states() == {"a": S.RUNNING, "t": S.QUEUED}
    reason = node.queue.reason(node.engines["engine-t"])
    assert reason
    assert "needs 5.0 GB of memory, and 4.0 GB are free" in reason.message
    node.devices = [DeviceMemory("cpu", 10 * GB, used_bytes={"server-a": 5 * GB})]
    node.settle()
    assert node.states() == {"a": S.RUNNING, "t": S.RUNNING}


def test_an_engine_starts_at_its_scheduled_time_and_not_before() -> None:
    node = Node(run("t", 6, not_before=NOW + timedelta(hours=1)))
    node.settle()
    reason = node.queue.reason(node.engines["engine-t"])
    assert reason
    assert (reason.code, "2030-01-01 01:00 UTC" in reason.message) == ("not_due", True)
    node.now += timedelta(hours=1)
    node.settle()
    assert node.states() == {"t": S.RUNNING}


def test_a_paused_run_frees_its_memory_and_continues_after_a_resume() -> None:
    node = Node(run("t", 8))
    node.settle()
    node.put(node.engines["engine-t"], desired=PAUSED, paused_by="user")
    node.settle()
    assert (node.states(), node.servers) == ({"t": S.PAUSED}, {})
    node.put(node.engines["engine-t"], desired=DesiredState.RUNNING)
    node.settle()
    assert node.states() == {"t": S.RUNNING}


def test_an_engine_that_a_user_paused_does_not_return_by_itself() -> None:
    node = Node(engine("a", 8))
    node.settle()
    node.put(node.engines["engine-a"], desired=PAUSED, paused_by="user")
    node.settle()
    assert node.states() == {"a": S.PAUSED}
    assert not is_waiting(node.engines["engine-a"])


def test_engines_without_an_estimate_start_at_once() -> None:
    node = Node(engine("a", 10), engine("b", 0, reserved_bytes=None))
    node.settle()
    assert node.states() == {"a": S.RUNNING, "b": S.RUNNING}
    assert node.servers["server-b"].reserved_bytes is None


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=8), st.data())
def test_a_moved_engine_gets_the_requested_position_among_engines_of_its_priority(
    priorities: list[int], data: st.DataObject
) -> None:
    waiting = sorted(
        (engine(str(number), 1, priority=priority, last_event=number) for number, priority in enumerate(priorities)),
        key=rank,
    )
    moved = data.draw(st.sampled_from(waiting))
    position = data.draw(st.integers(1, len(waiting) + 1))
    placed = dataclasses.replace(moved, queue_rank=rank_at(moved, position, waiting))
    order = sorted((placed if other.id == moved.id else other for other in waiting), key=rank)
    peers = [number for number, other in enumerate(order, start=1) if other.priority == moved.priority]
    assert order.index(placed) + 1 == min(max(position, peers[0]), peers[-1])


def test_an_engine_with_an_unknown_backend_does_not_stop_the_queue() -> None:
    node = Node(engine("a", 1, backend="removed"), engine("b", 1))
    node.devices = [DeviceMemory("cpu", 10 * GB), DeviceMemory("gpu-0", 10 * GB)]
    assert {action.engine.id for action in node.tick()} == {"engine-a", "engine-b"}
