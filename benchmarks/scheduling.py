"""Compare SAGE's admission with the policy "first come, first served", which never preempts an engine.

The benchmark simulates a day of 500 engines on 16 devices, without hardware. SAGE's decisions are made by
`sage.llm.control_plane.admission`.
"""

import argparse
import heapq
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from sage.llm.client.types import OnBusy
from sage.llm.control_plane.admission import Claim, Decision, DeviceMemory, Holder, MakeRoom, Start, Wait, admit

GIB, HOUR, DAY = 2**30, 3600.0, 86_400.0
#: Time in which a paused engine answers its open requests and exits, and time in which it starts again.
PAUSE_SECONDS, START_SECONDS = 10.0, 30.0
Policy = Callable[[list[DeviceMemory], list[Holder], list[Claim]], dict[str, Decision]]


@dataclass
class Engine:
    """A simulated engine. A model is stopped `seconds` after its first start; a run ends after `seconds` of training."""

    claim: Claim
    is_run: bool
    arrives: float
    seconds: float
    queued_at: float = 0.0
    first_wait: float | None = None  #: from the request to the first start
    away_seconds: float = 0.0  #: time in which the engine was paused, restarts included
    epoch: int = 0  #: incremented by each pause, so that old events are ignored


@dataclass
class Day:
    """The state of the simulation."""

    devices: list[DeviceMemory]
    policy: Policy
    engines: dict[str, Engine]
    holders: dict[str, Holder] = field(default_factory=dict)
    queue: list[Claim] = field(default_factory=list)
    events: list[tuple[float, int, str, str, int]] = field(default_factory=list)
    now: float = 0.0
    used_byte_seconds: float = 0.0
    pauses: int = 0
    _count: int = 0

    def run(self) -> None:
        """Simulate from the first request until the end of the day."""
        for name, engine in self.engines.items():
            self._at(engine.arrives, "arrive", name)
        while self.events and self.events[0][0] <= DAY:
            at, _, what, name, epoch = heapq.heappop(self.events)
            self._pass_time(at)
            self._happen(what, name, epoch)
            self._decide()
        self._pass_time(DAY)

    def _at(self, time: float, what: str, name: str) -> None:
        self._count += 1
        heapq.heappush(self.events, (time, self._count, what, name, self.engines[name].epoch))

    def _pass_time(self, at: float) -> None:
        used = sum(holder.memory_bytes * len(holder.devices) for holder in self.holders.values())
        self.used_byte_seconds += used * (at - self.now)
        self.now = at

    def _happen(self, what: str, name: str, epoch: int) -> None:
        engine = self.engines[name]
        if what == "arrive":
            self._enqueue(engine.claim)
        elif what == "end":  # a run has finished, or a model is no longer needed
            if epoch == engine.epoch or not engine.is_run:
                self.holders.pop(name, None)
                self.queue = [claim for claim in self.queue if claim.engine_id != name]
        elif name in self.holders:  # "paused": its process has exited
            del self.holders[name]
            self._enqueue(engine.claim.after_pause())

    def _enqueue(self, claim: Claim) -> None:
        self.engines[claim.engine_id].queued_at = self.now
        self.queue.insert(sum(other.priority >= claim.priority for other in self.queue), claim)

    def _decide(self) -> None:
        decisions = self.policy(self.devices, list(self.holders.values()), self.queue)
        for claim in list(self.queue):
            engine = self.engines[claim.engine_id]
            match decisions[claim.engine_id]:
                case Start(devices, memory_bytes):
                    self.queue.remove(claim)
                    self._start(engine, devices, memory_bytes)
                case MakeRoom(pause, _):
                    self.queue[self.queue.index(claim)] = replace(claim, has_room=True)
                    for name in pause:
                        self.holders[name] = replace(self.holders[name], is_leaving=True)
                        self.engines[name].epoch += 1
                        self._at(self.now + PAUSE_SECONDS, "paused", name)
                        self.pauses += 1

    def _start(self, engine: Engine, devices: tuple[str, ...], memory_bytes: int) -> None:
        waited = self.now - engine.queued_at
        if engine.first_wait is None:
            engine.first_wait = waited
        else:
            engine.away_seconds += PAUSE_SECONDS + waited + START_SECONDS
        name, is_run = engine.claim.engine_id, engine.is_run
        self.holders[name] = Holder(name, memory_bytes, devices, engine.claim.priority, is_pausable=not is_run, ends=is_run)
        if is_run:
            self._at(self.now + START_SECONDS + engine.seconds, "end", name)
        elif engine.away_seconds == 0:
            self._at(engine.arrives + engine.first_wait + engine.seconds, "end", name)


def first_come_first_served(devices: list[DeviceMemory], holders: list[Holder], waiting: list[Claim]) -> dict[str, Decision]:
    """Start engines strictly in the order of the queue. If an engine does not fit, all later engines wait."""
    decisions = admit(devices, holders, [replace(claim, on_busy=OnBusy.WAIT) for claim in waiting])
    is_blocked = False
    for position, (name, decision) in enumerate(list(decisions.items()), start=1):
        is_blocked = is_blocked or not isinstance(decision, Start)
        if is_blocked and isinstance(decision, Start):
            decisions[name] = Wait(position, cause=None)  # type: ignore[arg-type]
    return decisions


def workload(seed: int, count: int) -> dict[str, Engine]:
    """Return the engines of a day: two thirds training runs, one third models; most requests come in working hours."""
    chance, engines = random.Random(seed), {}  # noqa: S311
    for number in range(count):
        is_run = chance.random() < 0.67
        arrives = min(max(chance.gauss(12 * HOUR, 4 * HOUR), 0), 23 * HOUR)
        size = chance.choice([4, 6, 8, 12, 16, 22])
        seconds = chance.lognormvariate(0, 0.8) * (0.7 if is_run else 3) * HOUR
        on_busy = chance.choice([OnBusy.PREEMPT, OnBusy.WAIT]) if is_run else OnBusy.WAIT
        claim = Claim(
            f"{'run' if is_run else 'model'}-{number}",
            size * GIB,
            device_count=2 if is_run and chance.random() < 0.05 else 1,
            on_busy=on_busy,
        )
        engines[claim.engine_id] = Engine(claim, is_run, arrives, seconds)
    return engines


def row(title: str, policy: Policy, seed: int, count: int, devices: list[DeviceMemory]) -> str:
    """Simulate a day and return a line of the table."""
    day = Day(devices, policy, workload(seed, count))
    day.run()
    total = sum(device.usable_bytes for device in devices) * DAY

    def waits(is_run: bool) -> list[float]:
        return sorted(
            (engine.first_wait if engine.first_wait is not None else DAY - engine.arrives) / 60
            for engine in day.engines.values()
            if engine.is_run is is_run
        )

    runs, models = waits(True), waits(False)
    never = sum(engine.first_wait is None for engine in day.engines.values())
    away = [engine.away_seconds / 60 for engine in day.engines.values() if engine.away_seconds]
    return (
        f"| {title} | {100 * day.used_byte_seconds / total:.1f} % | {statistics.median(runs):.1f} | "
        f"{statistics.mean(runs):.1f} | {runs[int(0.95 * len(runs))]:.1f} | {statistics.mean(models):.1f} | "
        f"{models[int(0.95 * len(models))]:.1f} | {day.pauses} | {statistics.median(away) if away else 0:.1f} | {never} |"
    )


def main() -> None:
    """Print the table, and write it to the file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=500)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    devices = [DeviceMemory(f"cuda:{index}", 24 * GIB) for index in range(options.devices)]
    lines = [
        f"{options.engines} engines in a day on {options.devices} simulated devices of 24 GiB, seed {options.seed}. "
        "Waiting times in minutes until the first start.",
        "",
        "| policy | memory used | run median | run mean | run p95 | model mean | model p95 | pauses | away | not started |",
        "|---|---|---|---|---|---|---|---|---|---|",
        row("admission", admit, options.seed, options.engines, devices),
        row("first come, first served", first_come_first_served, options.seed, options.engines, devices),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("# Scheduling\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
