import asyncio
import dataclasses
import errno
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from sqlalchemy.exc import OperationalError

from sage.common.errors import SageError
from sage.common.identity import ProcessIdentity
from sage.common.processes import ProcessSpec
from sage.common.training import TrainingProgress
from sage.llm.client.types import DesiredState, EngineKind, EngineState, Reason, RestartPolicy
from sage.llm.control_plane import validation
from sage.llm.control_plane.executors.adapter_client import AdapterClient
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import ProcessObservation, Signal
from sage.llm.control_plane.plan import Limits
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.probes import Prober
from sage.llm.control_plane.reconciler import Reconciler
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.runner import Runner
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord, ServerState
from sage.llm.control_plane.store.store import StaleWrite, Store

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20)
DEAD = Reason(code="engine_died", message="dead")
TIMEOUT_SECONDS = 20.0


class World:
    """A launcher and executor that starts no real processes, for the tests of the reconciler."""

    def __init__(self) -> None:
        self.launch_error: Exception | None = None
        self.launched: list[str] = []
        self.signals: list[tuple[str, Signal]] = []
        self.alive: set[str] = set()  #: handles
        self.unknown: set[str] = set()  #: handles that cannot be observed
        self.hung: set[str] = set()  #: engines whose probes never end
        self.silent: set[str] = set()  #: engines that do not answer
        self.training: dict[str, TrainingProgress] = {}
        self.validations: dict[str, Callable[[], None]] = {}
        self.release = asyncio.Event()
        self.release.set()

    async def launch(self, spec: ProcessSpec) -> str:
        handle = str(spec.lock_path)
        self.launched.append(handle)
        await self.release.wait()
        if self.launch_error:
            raise self.launch_error
        self.alive.add(handle)
        return "127.0.0.1:77"

    async def observe(self, handles: Collection[str]) -> Mapping[str, ProcessObservation]:
        known = set(handles) - self.unknown
        return {handle: ProcessObservation(handle in self.alive, address="127.0.0.1:78") for handle in known}

    async def signal(self, handle: str, signal: Signal) -> None:
        self.signals.append((handle, signal))
        self.alive.discard(handle)

    async def validate(self, engine: EngineRecord) -> Mapping[str, Any]:
        self.validations.get(engine.id, lambda: None)()
        return {}

    def plan_server(self, engine: EngineRecord, *, is_moved: bool = False) -> ServerRecord:
        suffix = engine.id.removeprefix("engine-")
        return server(ServerState.PLANNED, id=f"server-{suffix}", handle=engine.id, address=None)

    def spec(self, engine: EngineRecord, _: ServerRecord) -> ProcessSpec:
        return ProcessSpec((), lock_path=Path(engine.id), log_path=Path("log"))

    async def probe(self, engine: EngineRecord, _: ServerRecord, process: ProcessObservation) -> Observed:
        if engine.id in self.hung:
            await asyncio.Event().wait()
        is_ready = process.alive and engine.id not in self.silent
        reason, training = None if process.alive else DEAD, self.training.get(engine.id)
        return Observed(process.alive, ready=is_ready, reason=reason, process=process, training=training)


class Loop:
    """A control plane that uses `World` instead of real processes, and its store."""

    def __init__(self, store: Store, lease: Lease, limits: Limits = LIMITS, probe_timeout_seconds: float = 0.2) -> None:
        self.store, self.lease, self.limits = store, lease, limits
        self.world: Any = World()
        self.held: Lease | None = lease
        self.probe_timeout_seconds = probe_timeout_seconds

    def add(self, *engines: EngineRecord) -> None:
        """Add engines. If an engine is in a state that requires a process, also add a process and a server."""
        for engine in engines:
            added = self.store.add(engine if engine.state in (S.VALIDATING, S.QUEUED) else record(id=engine.id), "user",
                                   self.lease)  # fmt: skip
            if engine.state not in (S.VALIDATING, S.QUEUED):
                with self.store._database.begin() as connection:
                    connection.exec_driver_sql("DELETE FROM engines WHERE id = ?", (engine.id,))
                suffix = engine.id.removeprefix("engine-")
                host = server(id=f"server-{suffix}", handle=engine.id)
                queued = dataclasses.replace(engine, state=S.QUEUED, server_id=host.id)
                added = self.store.add(queued, "user", self.lease)
                added = self.store.transition(added, S.STARTING, actor="test", lease=self.lease, put_server=host)
                self.world.alive.add(engine.id)
                for state in {S.RUNNING: [S.RUNNING], S.STOPPING: [S.STOPPING]}.get(engine.state, []):
                    added = self.store.transition(added, state, actor="test", lease=self.lease)

    def state(self, engine_id: str = "engine-a") -> EngineState:
        return self.store.get(engine_id).state

    def run(self, test: Callable[["Loop"], Awaitable[None]]) -> None:
        async def main() -> None:
            pool, executors = Pool("store", 4), dict.fromkeys(EngineKind, self.world)
            self.prober = Prober(executors, self.world, lambda: None, self.probe_timeout_seconds)
            self.runner = Runner(
                self.store, pool, executors, self.world, AdapterClient(), RoutingTable("n"), lambda: self.held
            )
            self.reconciler = Reconciler(self.store, pool, "n", self.prober, self.runner, self.limits)
            probing = asyncio.create_task(self.prober.run())
            try:
                await test(self)
            finally:
                probing.cancel()
                await self.runner.close()
                await self.prober.close()

        asyncio.run(main())

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline_seconds = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline_seconds
            await self.reconciler.tick(is_active=self.held is not None)
            await asyncio.sleep(0.01)

    async def ticked(self, ticks: int = 3) -> None:
        for _ in range(ticks):
            await self.reconciler.tick(is_active=True)
            await self.runner.idle()


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    store = Store(open_database(f"sqlite:///{tmp_path}/state/engines.db"), lease_seconds=600)
    store.register_node("n", "host")
    lease = store.acquire_lease("n", "me", "host", ProcessIdentity.unknown())
    assert lease is not None
    return Loop(store, lease)


def test_an_engine_is_validated_launched_and_running_and_each_step_is_written_before_the_next(loop: Loop) -> None:
    loop.add(record(S.VALIDATING))

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert [event.after for event in loop.store.events(limit=9)] == [S.VALIDATING, S.QUEUED, S.STARTING, S.RUNNING]
    (host,) = loop.store.servers("n")
    assert (host.state, host.address) == (ServerState.LAUNCHED, "127.0.0.1:77")


@pytest.mark.parametrize("error", [SageError(code="c", message="no model"), OSError("no space")])
def test_an_engine_that_cannot_be_launched_fails_with_the_reason_and_its_server_is_removed(
    loop: Loop, error: Exception
) -> None:
    loop.add(record(), record(id="engine-b"))

    async def test(loop: Loop) -> None:
        loop.world.launch_error = error
        await loop.until(lambda: loop.state() is S.FAILED)

    loop.run(test)
    assert str(error) in (loop.store.get("engine-a").reason or DEAD).message
    assert loop.store.servers("n") == []


def test_a_launch_with_an_unknown_result_is_retried_and_its_engine_does_not_fail(loop: Loop) -> None:
    loop.add(record())

    async def test(loop: Loop) -> None:
        loop.world.launch_error = TimeoutError()
        await loop.until(lambda: len(loop.world.launched) == 3)
        assert loop.state() is S.STARTING
        loop.world.launch_error = None
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)


@pytest.mark.parametrize("state", [S.STARTING, S.RUNNING, S.STOPPING])
def test_an_engine_that_cannot_be_observed_keeps_its_state_and_is_not_launched_again(
    loop: Loop, state: EngineState, caplog: pytest.LogCaptureFixture
) -> None:
    loop.add(record(state))
    last = loop.store.last_event()

    async def test(loop: Loop) -> None:
        loop.world.unknown.add("engine-a")
        await loop.until(lambda: "cannot be observed" in loop.prober.trouble("engine-a"))
        await loop.ticked(5)
        assert loop.store.last_event() == last
        assert loop.world.launched == []
        assert sum("cannot be observed" in entry.message for entry in caplog.records) == 1  # logged once, not at every probe
        loop.world.unknown.clear()
        loop.world.alive.clear()
        await loop.until(lambda: loop.state() in (S.FAILED, S.STOPPED))

    loop.run(test)


def test_a_planned_server_is_not_launched_while_its_process_cannot_be_observed(loop: Loop) -> None:
    loop.add(record())

    async def test(loop: Loop) -> None:
        loop.world.unknown.add("engine-a")
        await loop.ticked()
        assert loop.state() is S.STARTING
        assert loop.world.launched == []
        loop.world.unknown.clear()
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert loop.world.launched == ["engine-a"]


def test_a_launched_server_whose_launch_was_not_recorded_is_adopted(loop: Loop) -> None:
    loop.add(record())
    loop.world.alive.add("engine-a")

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert loop.world.launched == []
    assert [host.address for host in loop.store.servers("n")] == ["127.0.0.1:78"]


@pytest.mark.parametrize("error", [OperationalError("", {}, Exception("database or disk is full")), StaleWrite("engine-a")])
@pytest.mark.parametrize("method", ["transition", "update_server"])
def test_a_failed_write_does_not_affect_other_engines_and_no_engine_is_launched_twice(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, error: Exception, method: str
) -> None:
    loop.add(record(), record(id="engine-b"))
    write = getattr(loop.store, method)

    def write_b_only(of: EngineRecord | ServerRecord, *arguments: Any, **values: Any) -> Any:
        if of.id.endswith("-a"):
            raise error
        return write(of, *arguments, **values)

    async def test(loop: Loop) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(loop.store, method, write_b_only)
            await loop.until(lambda: loop.state("engine-b") is S.RUNNING)
            await loop.ticked()
        assert loop.state() is (S.QUEUED if method == "transition" else S.STARTING)
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert sorted(loop.world.launched) == ["engine-a", "engine-b"]


def test_a_slow_launch_is_not_repeated_and_does_not_delay_other_engines(loop: Loop) -> None:
    loop.add(record(), record(S.RUNNING, id="engine-b", desired=DesiredState.STOPPED))

    async def test(loop: Loop) -> None:
        loop.world.release.clear()
        await loop.until(lambda: loop.state("engine-b") is S.STOPPED)
        assert loop.world.launched == ["engine-a"]
        loop.world.release.set()
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert loop.world.launched == ["engine-a"]


def test_a_hundred_hung_probes_do_not_delay_the_start_of_a_healthy_engine(loop: Loop) -> None:
    hung = [record(S.RUNNING, id=f"engine-{i}") for i in range(100)]
    loop.add(*hung)
    loop.probe_timeout_seconds = 600

    async def test(loop: Loop) -> None:
        loop.world.hung |= {engine.id for engine in hung}
        await loop.ticked()
        await asyncio.sleep(0.3)  # every hung engine is being probed
        loop.add(record())
        await loop.until(lambda: loop.state() is S.RUNNING)
        assert {loop.state(engine.id) for engine in hung} == {S.RUNNING}

    loop.run(test)


def test_a_stop_signal_that_cannot_be_sent_is_retried_and_after_that_not_repeated(loop: Loop) -> None:
    loop.add(record(S.RUNNING, DesiredState.STOPPED))
    send = loop.world.signal

    async def refused(handle: str, signal: Signal) -> None:
        raise PermissionError

    async def ignored(handle: str, signal: Signal) -> None:
        loop.world.signals.append((handle, signal))

    async def test(loop: Loop) -> None:
        loop.world.signal = refused
        await loop.until(lambda: loop.state() is S.STOPPING)
        await loop.ticked()
        loop.world.signal = ignored
        await loop.ticked(10)
        assert loop.world.signals == [("engine-a", Signal.STOP)]
        assert loop.state() is S.STOPPING
        loop.world.signal = send
        loop.world.alive.clear()
        await loop.until(lambda: loop.state() is S.STOPPED)

    loop.run(test)


def test_a_running_engine_that_does_not_answer_is_silent_and_keeps_its_state(loop: Loop) -> None:
    loop.add(record(S.RUNNING))

    async def test(loop: Loop) -> None:
        loop.world.silent.add("engine-a")
        await loop.until(lambda: loop.reconciler.silent_seconds("engine-a") > 0.1)
        assert loop.state() is S.RUNNING
        loop.world.silent.clear()
        await loop.until(lambda: loop.reconciler.silent_seconds("engine-a") == 0)

    loop.run(test)


def test_without_the_lease_engines_are_observed_and_nothing_is_done(loop: Loop) -> None:
    loop.add(record(), record(S.RUNNING, id="engine-b", desired=DesiredState.STOPPED))

    async def test(loop: Loop) -> None:
        loop.held = None
        await loop.until(lambda: "engine-b" in loop.prober.observed())
        await loop.ticked()  # these ticks run as if the lease were still held
        assert (loop.state(), loop.state("engine-b")) == (S.QUEUED, S.RUNNING)
        loop.held = Lease("n", loop.lease.fence - 1)  # another control plane has taken over
        await loop.ticked()
        assert (loop.state(), loop.state("engine-b")) == (S.QUEUED, S.RUNNING)

    loop.run(test)
    assert (loop.world.launched, loop.world.signals) == ([], [])


def test_a_slow_validation_does_not_delay_other_engines_or_the_stop_of_its_own_engine(loop: Loop) -> None:
    loop.add(record(S.VALIDATING, kind=EngineKind.FINETUNE), record(S.VALIDATING, id="engine-b"))
    is_released = False

    def hashes() -> None:
        while not is_released:
            time.sleep(0.01)

    async def test(loop: Loop) -> None:
        nonlocal is_released
        loop.world.validations["engine-a"] = hashes
        await loop.until(lambda: loop.state("engine-b") is S.RUNNING)
        assert loop.state() is S.VALIDATING
        loop.store.set_desired(loop.store.get("engine-a"), DesiredState.STOPPED, force=False, actor="user", lease=loop.lease)
        await loop.until(lambda: loop.state() is S.STOPPED)
        assert loop.runner.validator.is_running("engine-a")  # the validation still reads the engine's files
        is_released = True
        await loop.until(lambda: not loop.runner.validator.is_running("engine-a"))
        assert loop.state() is S.STOPPED

    loop.run(test)


@pytest.mark.parametrize("state", [S.VALIDATING, S.QUEUED])
def test_an_engine_that_is_killed_before_it_has_a_process_is_stopped_and_never_launched(
    loop: Loop, state: EngineState
) -> None:
    loop.add(record(state, DesiredState.STOPPED, force=True))

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state() is S.STOPPED)
        await loop.ticked()

    loop.run(test)
    assert loop.state() is S.STOPPED
    assert (loop.world.launched, loop.world.signals) == ([], [])


@pytest.mark.parametrize("policy", [RestartPolicy.NO, RestartPolicy.UNLESS_STOPPED])
def test_the_figures_of_a_run_are_written_with_the_transition_that_ends_it(loop: Loop, policy: RestartPolicy) -> None:
    loop.add(record(S.RUNNING, kind=EngineKind.FINETUNE, restart_policy=policy))
    before = loop.store.get("engine-a")
    loop.world.training["engine-a"] = TrainingProgress(step=7)
    loop.world.alive.clear()

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state() is not S.RUNNING)

    loop.run(test)
    after = loop.store.get("engine-a")
    assert after.figures is not None
    assert after.figures["step"] == 7
    assert after.version == before.version + (1 if policy is RestartPolicy.NO else 2)


@pytest.mark.parametrize(
    ("error", "code"), [(SageError(code="c", message="no data"), "c"), (OSError("no space"), "validation_failed")]
)
def test_an_engine_that_is_not_valid_fails_with_the_reason(loop: Loop, error: Exception, code: str) -> None:
    loop.add(record(S.VALIDATING))

    def fails() -> None:
        raise error

    async def test(loop: Loop) -> None:
        loop.world.validations["engine-a"] = fails
        await loop.until(lambda: loop.state() is S.FAILED)

    loop.run(test)
    reason = loop.store.get("engine-a").reason
    assert reason is not None
    assert reason.code == code
    assert str(error) in reason.message


def test_a_validation_is_retried_if_too_many_files_are_open(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_RETRY_SECONDS", 0.0)
    loop.add(record(S.VALIDATING))
    attempts: list[str] = []

    def fails_twice() -> None:
        attempts.append("")
        if len(attempts) < 3:
            raise OSError(errno.EMFILE, "Too many open files")

    async def test(loop: Loop) -> None:
        loop.world.validations["engine-a"] = fails_twice
        await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert len(attempts) == 3


@pytest.mark.parametrize(
    ("policy", "is_restarted"),
    [(RestartPolicy.NO, False), (RestartPolicy.ON_FAILURE, False), (RestartPolicy.UNLESS_STOPPED, True)],
)
def test_an_engine_that_exited_while_no_control_plane_ran_is_restarted_only_with_unless_stopped(
    loop: Loop, policy: RestartPolicy, is_restarted: bool
) -> None:
    loop.add(record(S.RUNNING, restart_policy=policy))
    loop.add(record(S.RUNNING, DesiredState.STOPPED, id="engine-b", restart_policy=policy))
    loop.world.alive.clear()

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state() is (S.RUNNING if is_restarted else S.FAILED))
        await loop.until(lambda: loop.state("engine-b") is S.FAILED)
        if is_restarted:
            await loop.until(lambda: loop.world.launched == ["engine-a"])
            await loop.until(lambda: loop.state() is S.RUNNING)

    loop.run(test)
    assert loop.store.get("engine-a").restarts == int(is_restarted)


def test_a_restart_waits_longer_each_time(loop: Loop) -> None:
    loop.add(record(S.RUNNING, restart_policy=RestartPolicy.ON_FAILURE, restarts=2))

    async def test(loop: Loop) -> None:
        await loop.until(lambda: "engine-a" in loop.prober.observed())
        await loop.ticked()
        loop.world.alive.clear()
        await loop.until(lambda: loop.state() is S.QUEUED)
        assert loop.store.get("engine-a").restarts == 3
        assert loop.store.get("engine-a").reason == DEAD
        await loop.ticked()
        assert loop.world.launched == []

    loop.run(test)


def test_an_error_in_the_plan_of_one_engine_does_not_stop_the_other_engines_and_is_logged_once(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.add(record(S.RUNNING, serve={"no": "served run"}), record(id="engine-b"))

    async def test(loop: Loop) -> None:
        await loop.until(lambda: loop.state("engine-b") is S.RUNNING and "engine-a" in loop.prober.observed())
        await loop.ticked()
        (problem,) = loop.reconciler.problems()
        assert "engine-a" in problem

    loop.run(test)
    assert [entry.message for entry in caplog.records] == ["engine-a cannot be reconciled, retrying"]


def test_the_loop_survives_an_error_of_the_whole_plan_and_continues_when_the_error_is_gone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.add(record())

    async def test(loop: Loop) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("sage.llm.control_plane.plan.queue_of", lambda *_: {}["bug"])
            await loop.ticked()
            assert [problem.partition(":")[0] for problem in loop.reconciler.problems()] == [
                "The next actions cannot be planned"
            ]
        await loop.until(lambda: loop.state() is S.RUNNING)
        assert loop.reconciler.problems() == []

    loop.run(test)


def test_a_control_plane_that_lost_the_lease_shows_no_queue(loop: Loop) -> None:
    loop.add(record())

    async def test(loop: Loop) -> None:
        await loop.reconciler.tick(is_active=True)
        assert loop.reconciler.queue.decisions
        await loop.reconciler.tick(is_active=False)
        assert not loop.reconciler.queue.decisions

    loop.run(test)


def test_a_new_checkpoint_wakes_the_reconciler_but_a_step_does_not(loop: Loop) -> None:
    run = record(S.RUNNING, kind=EngineKind.FINETUNE, serve={"name": "m"})
    loop.world.alive.add("engine-a")
    progress = TrainingProgress(step=1, total_steps=9, progress=0.1)
    seen: list[int | None] = []

    async def test(loop: Loop) -> None:
        def note() -> None:
            last = prober.last("engine-a")
            seen.append(last.training.checkpoint_step if last and last.training else -1)

        async def probed(**values: int) -> None:
            loop.world.training["engine-a"] = progress.model_copy(update=values)
            await prober._probe(target, asyncio.create_task(loop.world.observe({"engine-a"})))

        prober = Prober({EngineKind.FINETUNE: loop.world}, loop.world, note)
        prober.watch([dataclasses.replace(run, server_id="server-a")], {"server-a": server(handle="engine-a")})
        target = prober._targets["engine-a"]
        await probed()
        await probed(step=2)
        await probed(step=3, checkpoint_step=3)
        await probed(step=4, checkpoint_step=3)

    loop.run(test)
    assert seen == [None, 3]
