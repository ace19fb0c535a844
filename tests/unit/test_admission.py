"""Admission decides as in a table of cases, and keeps its guarantees in random sequences of events."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.llm.client.types import OnBusy
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

ONE, TWO = [DeviceMemory("g0", 24)], [DeviceMemory("g0", 24), DeviceMemory("g1", 24)]
MIXED = [DeviceMemory("g0", 16), DeviceMemory("g1", 24), DeviceMemory("g2", 80)]


def model(name: str, size: int, device: str = "g0", **fields: Any) -> Holder:
    return Holder(name, size, tuple(device.split()), is_pausable=True, **fields)


def run(name: str, size: int, device: str = "g0", **fields: Any) -> Holder:
    return Holder(name, size, tuple(device.split()), ends=True, **fields)


def want(name: str, size: int, on_busy: str = "wait", **fields: Any) -> Claim:
    return Claim(name, size, on_busy=OnBusy(on_busy), **fields)


def start(device: str, size: int) -> Start:
    return Start(tuple(device.split()), size)


def wait(position: int, cause: Cause, free: int) -> Wait:
    return Wait(position, cause, free)


CASES: dict[str, tuple[Sequence[DeviceMemory], list[Holder], list[Claim], list[Decision]]] = {
    "nothing waits": (ONE, [model("a", 10)], [], []),
    "an empty device": (ONE, [], [want("t", 10)], [start("g0", 10)]),
    "exactly enough": (ONE, [model("a", 4)], [want("t", 20)], [start("g0", 20)]),
    "one byte too little": (ONE, [model("a", 5)], [want("t", 20)], [wait(1, Cause.MEMORY, 19)]),
    "an engine that needs no memory starts on a full device": (ONE, [model("a", 24)], [want("t", 0)], [start("g0", 0)]),
    "two that fit together": (ONE, [], [want("s", 12), want("t", 12)], [start("g0", 12), start("g0", 12)]),
    "the second of two does not fit": (
        ONE, [], [want("s", 14), want("t", 12)], [start("g0", 14), wait(2, Cause.MEMORY, 10)],
    ),
    "more than the device has": (ONE, [], [want("t", 25)], [Refuse(Cause.TOO_LARGE, 24)]),
    "more than any device has": (MIXED, [], [want("t", 81)], [Refuse(Cause.TOO_LARGE, 80)]),
    "no devices": ([], [], [want("t", 1)], [Refuse(Cause.NO_DEVICE)]),
    "a device that is not there": (ONE, [], [want("t", 1, devices=("g7",))], [Refuse(Cause.NO_DEVICE)]),
    "two devices where one is": (ONE, [], [want("t", 1, device_count=2)], [Refuse(Cause.NO_DEVICE)]),
    "the named device": (TWO, [], [want("t", 10, devices=("g1",))], [start("g1", 10)]),
    "the named device is full, another is free": (
        TWO, [model("a", 20, "g1")], [want("t", 10, devices=("g1",))], [wait(1, Cause.MEMORY, 4)],
    ),
    "the smallest gap that fits": (MIXED, [], [want("t", 20)], [start("g1", 20)]),
    "a large device is kept for large engines": (MIXED, [], [want("t", 10)], [start("g0", 10)]),
    "two devices": (TWO, [], [want("t", 20, device_count=2)], [start("g0 g1", 20)]),
    "two devices, one of them busy": (
        TWO, [run("r", 20)], [want("t", 20, device_count=2)], [wait(1, Cause.MEMORY, 24)],
    ),
    "an engine on two devices uses memory of both": (
        TWO, [run("r", 20, "g0 g1")], [want("t", 10)], [wait(1, Cause.MEMORY, 4)],
    ),
    "memory that other programs use is not given away": (
        [DeviceMemory("g0", 24, foreign_bytes=20)], [], [want("t", 10)], [wait(1, Cause.MEMORY, 4)],
    ),
    "memory that other programs use may become free": (
        [DeviceMemory("g0", 24, foreign_bytes=24)], [], [want("t", 24)], [wait(1, Cause.MEMORY, 0)],
    ),
    "other programs use more than there is to give": (
        [DeviceMemory("g0", 24, foreign_bytes=30)], [], [want("t", 1)], [wait(1, Cause.MEMORY, -6)],
    ),
    "fail at once": (ONE, [model("a", 20)], [want("t", 10, "fail")], [Refuse(Cause.MEMORY, 4)]),
    "fail is asked for and there is room": (ONE, [model("a", 10)], [want("t", 10, "fail")], [start("g0", 10)]),
    "one that fails keeps nothing reserved": (
        ONE, [run("r", 20)], [want("s", 10, "fail"), want("t", 4)], [Refuse(Cause.MEMORY, 4), start("g0", 4)],
    ),
    "share takes what is free": (ONE, [model("a", 20)], [want("t", 10, "share", least_bytes=3)], [start("g0", 4)]),
    "share with all that it wants": (ONE, [model("a", 10)], [want("t", 10, "share", least_bytes=3)], [start("g0", 10)]),
    "share where the least does not fit": (
        ONE, [model("a", 22)], [want("t", 10, "share", least_bytes=3)], [wait(1, Cause.MEMORY, 2)],
    ),
    "share takes the device with the most room": (
        TWO, [model("a", 20), model("b", 18, "g1")], [want("t", 10, "share", least_bytes=3)], [start("g1", 6)],
    ),
    "only share uses the smallest need": (
        ONE, [model("a", 20)], [want("t", 10, least_bytes=3)], [wait(1, Cause.MEMORY, 4)],
    ),
    "preempt pauses a model": (ONE, [model("a", 20)], [want("t", 10, "preempt")], [MakeRoom(("a",), ("g0",))]),
    "preempt pauses nobody if there is room": (ONE, [model("a", 10)], [want("t", 10, "preempt")], [start("g0", 10)]),
    "preempt pauses as few as possible": (
        ONE, [model("a", 4), model("b", 8), model("c", 12)], [want("t", 10, "preempt")], [MakeRoom(("c",), ("g0",))],
    ),
    "preempt pauses the lowest priority": (
        ONE, [model("a", 12, priority=1), model("b", 12)], [want("t", 10, "preempt", priority=1)],
        [MakeRoom(("b",), ("g0",))],
    ),
    "an early choice that became unnecessary runs on": (
        ONE, [model("a", 4), model("b", 20, priority=1)], [want("t", 20, "preempt", priority=1)],
        [MakeRoom(("b",), ("g0",))],
    ),
    "a higher priority is never paused": (
        ONE, [model("a", 20, priority=5)], [want("t", 10, "preempt")], [wait(1, Cause.MEMORY, 4)],
    ),
    "a training run is never paused for another": (
        ONE, [run("r", 20)], [want("t", 10, "preempt")], [wait(1, Cause.MEMORY, 4)],
    ),
    "preempt uses the device where less must be paused": (
        TWO, [model("a", 12), model("b", 12), model("c", 20, "g1")], [want("t", 20, "preempt")], [MakeRoom(("c",), ("g1",))],
    ),
    "who makes room is not asked twice": (
        ONE, [model("a", 20, is_leaving=True)], [want("t", 10, "preempt")], [wait(1, Cause.ROOM, 4)],
    ),
    "what leaves is for the engine in front": (
        ONE, [model("a", 20, is_leaving=True)], [want("t", 20, "preempt"), want("u", 4)],
        [wait(1, Cause.ROOM, 4), start("g0", 4)],
    ),
    "nobody takes the room that was made": (
        ONE, [model("a", 20, is_leaving=True)], [want("t", 22, "preempt"), want("u", 4)],
        [wait(1, Cause.ROOM, 4), wait(2, Cause.RESERVED, 4)],
    ),
    "a paused model does not take its memory back first": (
        ONE, [], [want("t", 20, "preempt"), want("a", 20)], [start("g0", 20), wait(2, Cause.MEMORY, 4)],
    ),
    "who waits ahead does not take the room that was made for another": (
        ONE, [run("r", 10), model("a", 14, is_leaving=True)], [want("s", 14), want("t", 14, "preempt", has_room=True)],
        [wait(1, Cause.MEMORY, 0), wait(2, Cause.ROOM, 0)],
    ),
    "nor when the paused model has exited": (
        ONE, [run("r", 10)], [want("s", 14), want("t", 14, "preempt", has_room=True)],
        [wait(1, Cause.MEMORY, 0), start("g0", 14)],
    ),
    "two preempt at once, each makes its own room": (
        ONE, [model("a", 12), model("b", 12)], [want("t", 12, "preempt"), want("u", 12, "preempt")],
        [MakeRoom(("a",), ("g0",)), MakeRoom(("b",), ("g0",))],
    ),
    "one pause makes room for two": (
        ONE, [model("a", 24)], [want("t", 12, "preempt"), want("u", 12, "preempt")],
        [MakeRoom(("a",), ("g0",)), wait(2, Cause.ROOM, 0)],
    ),
    "preempt of two devices": (
        TWO, [model("a", 20, "g0 g1")], [want("t", 20, "preempt", device_count=2)], [MakeRoom(("a",), ("g0", "g1"))],
    ),
    "a small run does not delay the head": (
        ONE, [run("r", 16)], [want("t", 20), want("u", 6)], [wait(1, Cause.MEMORY, 8), wait(2, Cause.RESERVED, 8)],
    ),
    "a small run that fits beside the head starts": (
        ONE, [run("r", 16)], [want("t", 20), want("u", 4)], [wait(1, Cause.MEMORY, 8), start("g0", 4)],
    ),
    "a small run uses another device": (
        TWO, [run("r", 16), model("a", 14, "g1")], [want("t", 20), want("u", 6)],
        [wait(1, Cause.MEMORY, 10), start("g1", 6)],
    ),
    "nothing is reserved for who waits for a model": (
        ONE, [model("a", 16)], [want("t", 20), want("u", 6)], [wait(1, Cause.MEMORY, 8), start("g0", 6)],
    ),
    "the second in the queue reserves if the first waits for a model": (
        TWO, [model("a", 16), run("r", 16, "g1")],
        [want("s", 20, devices=("g0",)), want("t", 20, devices=("g1",)), want("u", 8, devices=("g1",))],
        [wait(1, Cause.MEMORY, 8), wait(2, Cause.MEMORY, 8), wait(3, Cause.RESERVED, 8)],
    ),
    "not before its time": (ONE, [], [want("t", 10, is_due=False)], [wait(1, Cause.NOT_DUE, 24)]),
    "who is not due reserves nothing": (
        ONE, [run("r", 16)], [want("t", 20, is_due=False), want("u", 8)], [wait(1, Cause.NOT_DUE, 8), start("g0", 8)],
    ),
    "not due, and never will fit": (ONE, [], [want("t", 30, is_due=False)], [Refuse(Cause.TOO_LARGE, 24)]),
    "an engine counts with what it uses if that is more than it reserved": (
        ONE, [model("a", 10, used_bytes={"g0": 16})], [want("t", 10)], [wait(1, Cause.MEMORY, 8)],
    ),
    "an engine counts with what it reserved if it uses less": (
        ONE, [model("a", 16, used_bytes={"g0": 2})], [want("t", 10)], [wait(1, Cause.MEMORY, 8)],
    ),
    "an engine uses memory of a device on which it has reserved none": (
        TWO, [model("a", 10, used_bytes={"g1": 20})], [want("t", 10, devices=("g1",))], [wait(1, Cause.MEMORY, 4)],
    ),
    "pausing an engine frees all that it uses": (
        ONE, [model("a", 4, used_bytes={"g0": 20}), model("b", 4)], [want("t", 20, "preempt")], [MakeRoom(("a",), ("g0",))],
    ),
    "engines use more than the device has to give": (
        ONE, [run("r", 20, used_bytes={"g0": 30})], [want("t", 1), want("u", 0)],
        [wait(1, Cause.MEMORY, -6), wait(2, Cause.MEMORY, -6)],
    ),
    "a holder on a device that disappeared": (ONE, [model("a", 20, "g9")], [want("t", 20)], [start("g0", 20)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_case_gets_its_decision(case: str) -> None:
    devices, holders, waiting, expected = CASES[case]
    decisions = admit(devices, holders, waiting)
    assert [decisions[claim.engine_id] for claim in waiting] == expected


class World:
    """A simulation that starts, pauses and refuses engines as `admit` decides."""

    def __init__(self, devices: Sequence[DeviceMemory]) -> None:
        self.devices = devices
        self.holders: dict[str, Holder] = {}
        self.queue: list[Claim] = []
        self.paused: set[str] = set()
        self.refused: set[str] = set()
        self.engines: dict[str, Claim] = {}

    def ask(self, claim: Claim) -> None:
        self.engines[claim.engine_id] = claim
        self._enqueue(claim)

    def _enqueue(self, claim: Claim) -> None:
        place = sum(other.priority >= claim.priority for other in self.queue)
        self.queue.insert(place, claim)

    def decide(self) -> dict[str, Decision]:
        decisions = admit(self.devices, list(self.holders.values()), self.queue)
        for claim in list(self.queue):
            match decisions[claim.engine_id]:
                case Start(devices, memory_bytes):
                    self.queue.remove(claim)
                    self.paused.discard(claim.engine_id)
                    is_run = claim.engine_id.startswith("run")
                    self.holders[claim.engine_id] = Holder(
                        claim.engine_id, memory_bytes, devices, claim.priority, is_pausable=not is_run, ends=is_run
                    )
                case MakeRoom(pause, _):
                    self.queue[self.queue.index(claim)] = dataclasses.replace(claim, has_room=True)
                    for engine_id in pause:
                        assert self.holders[engine_id].is_pausable
                        assert self.holders[engine_id].priority <= claim.priority
                        self.holders[engine_id] = dataclasses.replace(self.holders[engine_id], is_leaving=True)
                case Refuse():
                    self.queue.remove(claim)
                    self.refused.add(claim.engine_id)
                case Wait():
                    pass
        self.check(decisions)
        return decisions

    def leave(self) -> None:
        """Let the engines that are being paused exit, and add them to the queue again."""
        for engine_id, holder in list(self.holders.items()):
            if holder.is_leaving:
                del self.holders[engine_id]
                self.paused.add(engine_id)
                self._enqueue(self.engines[engine_id].after_pause())

    def end(self, index: int) -> None:
        runs = [engine_id for engine_id, holder in self.holders.items() if holder.ends]
        if runs:
            del self.holders[runs[index % len(runs)]]

    def grow(self, index: int, size: int) -> None:
        """Set the memory that a running engine uses on its first device."""
        if self.holders:
            engine_id = sorted(self.holders)[index % len(self.holders)]
            holder = self.holders[engine_id]
            self.holders[engine_id] = dataclasses.replace(holder, used_bytes={holder.devices[0]: size})

    def check(self, decisions: dict[str, Decision]) -> None:
        started = {key for decision in decisions.values() if isinstance(decision, Start) for key in decision.devices}
        for device in self.devices:
            held = sum(holder.memory_bytes for holder in self.holders.values() if device.id in holder.devices)
            assert held <= device.usable_bytes
            assert device.id not in started or self.free_bytes(device) >= 0

    def free_bytes(self, device: DeviceMemory) -> int:
        return device.usable_bytes - sum(holder.bytes_on(device.id) for holder in self.holders.values())


DEVICES = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(
    lambda sizes: [DeviceMemory(f"g{index}", size) for index, size in enumerate(sizes)]
)
CLAIMS = st.builds(
    Claim,
    engine_id=st.sampled_from(["model", "run"]),
    memory_bytes=st.integers(0, 40),
    least_bytes=st.none() | st.just(1),
    device_count=st.integers(1, 2),
    priority=st.integers(0, 2),
    on_busy=st.sampled_from(OnBusy),
)
GROWTHS = st.tuples(st.integers(0, 9), st.integers(0, 40))
STEPS = st.lists(st.one_of(CLAIMS, st.sampled_from(["decide", "leave"]), st.integers(0, 9), GROWTHS), max_size=40)


Step = Claim | str | int | tuple[int, int]
SEQUENCES = given(DEVICES, STEPS)


def follow(devices: list[DeviceMemory], steps: list[Step]) -> None:
    """Simulate a sequence of events, and check the guarantees of admission."""
    world = World(devices)
    for number, step in enumerate(steps):
        match step:
            case Claim():
                world.ask(dataclasses.replace(step, engine_id=f"{step.engine_id}-{number}"))
            case "decide":
                world.decide()
            case "leave":
                world.leave()
            case int():
                world.end(step)
            case (index, size):
                world.grow(index, size)
    # From now on, no new engines arrive. In each round, the paused engines exit and one training run ends.
    for _ in range(4 * len(world.engines) + 4):
        world.decide()
        world.leave()
        world.end(0)
    decisions = world.decide()
    for claim in world.queue:  # an engine that still waits does not fit beside the running models
        assert isinstance(decisions[claim.engine_id], Wait)
        rooms = map(world.free_bytes, devices)
        assert sum(room >= claim.memory_bytes for room in rooms) < claim.device_count
    while world.paused:  # if all running engines are stopped, a paused engine can start
        count = len(world.paused)
        world.holders.clear()
        world.queue = [claim for claim in world.queue if claim.engine_id in world.paused]
        world.decide()
        assert len(world.paused) < count


@SEQUENCES
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_memory_is_reserved_twice_and_no_engine_waits_forever(devices: list[DeviceMemory], steps: list[Step]) -> None:
    follow(devices, steps)


@pytest.mark.long
@SEQUENCES
@settings(max_examples=10_000, deadline=None, derandomize=True)
def test_the_guarantees_hold_in_10_000_sequences(devices: list[DeviceMemory], steps: list[Step]) -> None:
    follow(devices, steps)
