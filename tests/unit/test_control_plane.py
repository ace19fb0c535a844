import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import record
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from sage.common.errors import NotFound, Overloaded, SageError
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.reconciler import Action, Effect, Limits, Reconciler, decide
from sage.llm.control_plane.selection import select_engine
from sage.llm.control_plane.states import SETTLED, TRANSITIONS, EngineState, IllegalTransition, check_transition
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import EngineRecord, StaleWrite, Store
from sage.llm.control_plane.types import DEFAULT_MODEL, EngineKind, Reason, Wanted
from sage.llm.control_plane.watch import Watch

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20)
DEAD = Reason(code="engine_died", message="dead")


def test_every_state_has_its_row_and_only_settled_ones_may_end_there() -> None:
    assert set(TRANSITIONS) == set(EngineState)
    for state, after in TRANSITIONS.items():
        assert after or state is S.COMPLETED
    with pytest.raises(IllegalTransition):
        check_transition(S.COMPLETED, S.RUNNING)


NEW, OLD = Watch(S.RUNNING), Watch(S.RUNNING, state_seconds=3600, ended_seconds=3600)
FINETUNE = {"kind": EngineKind.FINETUNE}
FORCE = Wanted.KILLED


@pytest.mark.parametrize(
    ("engine", "observed", "watch", "action"),
    [
        (record(), Observed(alive=False), NEW, Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=True), NEW, Action(Effect.ADOPT, S.STARTING)),
        (record(), Observed(alive=False, ended=S.STOPPED), NEW, Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=True, ended=S.STOPPED), NEW, Action()),
        (record(wanted=Wanted.STOPPED), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(wanted=FORCE), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(wanted=Wanted.STOPPED), Observed(alive=True), NEW, Action(Effect.ADOPT, S.STARTING)),
        (record(S.STARTING), Observed(alive=True), NEW, Action()),
        (record(S.STARTING), Observed(alive=True, ready=True), NEW, Action(state=S.RUNNING)),
        (record(S.STARTING), Observed(alive=False, reason=DEAD), NEW, Action(state=S.FAILED, reason=DEAD)),
        (record(S.STARTING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.RUNNING)),
        (record(S.STARTING, Wanted.STOPPED), Observed(alive=True), NEW, Action(Effect.STOP, S.STOPPING)),
        (record(S.STARTING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL, S.STOPPING)),
        (record(S.STARTING), Observed(alive=True), OLD, Action(Effect.KILL)),
        (record(S.STARTING, **FINETUNE), Observed(alive=True), OLD, Action()),
        (record(S.RUNNING), Observed(alive=True, ready=True), NEW, Action()),
        (record(S.RUNNING), Observed(alive=True), OLD, Action()),
        (record(S.RUNNING), Observed(alive=False, reason=DEAD), NEW, Action(state=S.FAILED, reason=DEAD)),
        (record(S.RUNNING, Wanted.STOPPED), Observed(alive=True, ready=True), NEW, Action(Effect.STOP, S.STOPPING)),
        (record(S.RUNNING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL, S.STOPPING)),
        (record(S.RUNNING), Observed(alive=True, orphaned=True), NEW, Action(Effect.KILL)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.COMPLETED)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.STOPPED), NEW, Action(state=S.STOPPED)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, Action()),
        (record(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), OLD, Action(Effect.KILL)),
        (record(S.RUNNING, FORCE, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=True), NEW, Action()),
        (record(S.STOPPING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=True), OLD, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED, **FINETUNE), Observed(alive=True), OLD, Action()),
        (record(S.STOPPING, FORCE), Observed(alive=False, reason=DEAD), NEW, Action(state=S.STOPPED)),
        (record(S.STOPPING, FORCE, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.COMPLETED)),
        (
            record(S.STOPPING, Wanted.STOPPED, **FINETUNE),
            Observed(alive=False, ended=S.COMPLETED),
            NEW,
            Action(state=S.COMPLETED),
        ),
    ],
)
def test_the_next_action_follows_from_what_is_wanted_and_what_is(
    engine: EngineRecord, observed: Observed, watch: Watch, action: Action
) -> None:
    assert decide(engine, observed, watch, LIMITS) == action


def test_an_engine_that_never_answers_is_failed_only_when_it_is_dead() -> None:
    assert decide(record(S.STARTING), Observed(alive=True), OLD, LIMITS) == Action(Effect.KILL)
    action = decide(record(S.STARTING), Observed(alive=False, reason=DEAD), OLD, LIMITS)
    assert (action.effect, action.state) == (Effect.NOTHING, S.FAILED)
    assert action.reason is not None
    assert action.reason.code == "start_timeout"


def test_a_run_that_was_killed_as_asked_has_failed_and_says_so() -> None:
    died = Reason(code="worker_died", message="dead", hint="`resume` goes on from checkpoint 5.")
    observed = Observed(alive=False, ended=S.FAILED, reason=died)
    action = decide(record(S.STOPPING, FORCE, **FINETUNE), observed, NEW, LIMITS)
    assert action.state is S.FAILED
    assert action.reason is not None
    assert (action.reason.code, action.reason.hint) == ("killed", died.hint)


@given(
    state=st.sampled_from([s for s in EngineState if s not in SETTLED]),
    wanted=st.sampled_from(Wanted),
    kind=st.sampled_from(EngineKind),
    alive=st.booleans(),
    ready=st.booleans(),
    orphaned=st.booleans(),
    ended=st.sampled_from([None, *SETTLED]),
    watch=st.sampled_from([NEW, OLD]),
)
def test_no_decision_is_ever_an_illegal_step(
    state: EngineState,
    wanted: Wanted,
    kind: EngineKind,
    alive: bool,
    ready: bool,
    orphaned: bool,
    ended: EngineState | None,
    watch: Watch,
) -> None:
    observed = Observed(alive=alive, ready=ready, ended=ended, orphaned=orphaned)
    action = decide(record(state, wanted, kind=kind), observed, watch, LIMITS)
    if action.state is not None:
        check_transition(state, action.state)
    if alive or orphaned:  # nothing is settled that still has a process
        assert action.state not in SETTLED


def test_a_minute_in_which_the_control_plane_itself_was_suspended_does_not_count() -> None:
    watch = Watch(S.STARTING, 100.0)
    for now in (101.0, 161.0, 162.0):  # it was stopped for a minute between the first look and the second
        watch.look(now, S.STARTING, 5, silent=True, ended=True)
    assert watch == Watch(S.STARTING, 162.0, state_seconds=7, silent_seconds=7, ended_seconds=7)
    watch.look(163.0, S.STARTING, 5, silent=False, ended=False)
    assert (watch.state_seconds, watch.silent_seconds, watch.ended_seconds) == (8, 0, 0)
    watch.look(164.0, S.RUNNING, 5, silent=True, ended=True)
    assert watch == Watch(S.RUNNING, 164.0)


def engines(*states: tuple[str, EngineState], **values: Any) -> list[EngineRecord]:
    return [record(state, id=name, last_event=i, **values) for i, (name, state) in enumerate(states)]


@pytest.mark.parametrize(
    ("states", "unresponsive", "found"),
    [
        ([("old", S.RUNNING), ("new", S.QUEUED)], "", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "", "old"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "", "new"),
        ([("old", S.RUNNING), ("new", S.STOPPING)], "", "old"),
        ([("old", S.STARTING), ("new", S.QUEUED)], "", "new"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "new", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "old", "new"),
    ],
)
@pytest.mark.parametrize("model", ["m", DEFAULT_MODEL])
def test_the_newest_that_runs_and_responds_serves_and_the_others_wait(
    states: list[tuple[str, EngineState]], unresponsive: str, found: str, model: str
) -> None:
    assert select_engine(engines(*states), model, EngineKind.LLM, lambda name: name != unresponsive).id == found


def test_the_default_model_is_the_one_that_ran_last_and_not_the_one_made_last() -> None:
    made_first = [record(S.RUNNING, id="resumed", last_event=9), record(S.RUNNING, id="new", last_event=8)]
    assert select_engine(made_first, DEFAULT_MODEL, EngineKind.LLM, lambda _: True).id == "resumed"
    assert select_engine(made_first, "m", EngineKind.LLM, lambda _: True).id == "new"


def test_the_only_engine_that_runs_and_does_not_respond_is_told_and_not_waited_for() -> None:
    with pytest.raises(Overloaded, match="does not respond"):
        select_engine(engines(("engine-a", S.RUNNING)), "m", EngineKind.LLM, lambda _: False)


def test_a_model_that_nobody_serves_is_named_with_those_that_there_are() -> None:
    with pytest.raises(NotFound, match="serves the model 'x'; there are: m"):
        select_engine(engines(("engine-a", S.RUNNING)), "x", EngineKind.LLM, lambda _: True)
    with pytest.raises(NotFound) as caught:
        select_engine([], "x" * 5000, EngineKind.LLM, lambda _: True)
    assert len(str(caught.value)) < 500


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_database(f"sqlite:///{tmp_path}/state/engines.db"))


class Executor:
    """Stands in for processes in the tests of the loop itself; observes and fails as it is told."""

    def __init__(self, launch_error: Exception | None = None) -> None:
        self.launch_error, self.launched, self.stopped = launch_error, 0, list[bool]()
        self.seen: Callable[[], Observed] = lambda: Observed(alive=False)
        self.release = asyncio.Event()
        self.release.set()

    async def observe(self, engine: EngineRecord) -> Observed:
        return self.seen()

    async def launch(self, engine: EngineRecord) -> int | None:
        self.launched += 1
        await self.release.wait()
        if self.launch_error:
            raise self.launch_error
        return 77

    async def port(self, engine: EngineRecord) -> int | None:
        return 78

    async def request_stop(self, engine: EngineRecord, *, force: bool) -> None:
        self.stopped.append(force)


def fails(error: Exception) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


async def ticked(reconciler: Reconciler, ticks: int = 1) -> None:
    for _ in range(ticks):
        await reconciler.tick()
        await reconciler.close()  # also steps that take longer than a tick


@pytest.mark.parametrize("error", [SageError(code="c", message="no model"), OSError("no space")])
def test_an_engine_that_cannot_be_launched_fails_with_the_reason_and_the_others_go_on(
    store: Store, error: Exception
) -> None:
    store.add(record(), "user")
    store.add(dataclasses.replace(record(), id="engine-b", kind=EngineKind.EMBEDDING), "user")
    executors: Any = {EngineKind.LLM: Executor(error), EngineKind.EMBEDDING: Executor()}
    asyncio.run(ticked(Reconciler(store, executors, LIMITS)))
    assert store.get("engine-a").state is S.FAILED
    assert str(error) in (store.get("engine-a").reason or DEAD).message
    assert (store.get("engine-b").state, store.get("engine-b").port) == (S.STARTING, 77)


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), OSError(116, "Stale file handle"), ZeroDivisionError()]
)
@pytest.mark.parametrize("state", [S.QUEUED, S.STARTING, S.RUNNING, S.STOPPING])
def test_what_cannot_be_observed_is_not_known_and_nothing_is_written(
    store: Store, state: EngineState, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(record(state), "user")
    executor = Executor()
    executor.seen = fails(error)
    asyncio.run(ticked(Reconciler(store, {EngineKind.LLM: executor}, LIMITS), ticks=3))  # type: ignore[dict-item]
    assert store.get("engine-a").state is state
    assert len(store.events("engine-a")) == 1
    assert executor.launched == 0
    assert len(caplog.records) == 1  # told once, not at every look


def test_an_engine_that_could_not_be_observed_for_a_while_goes_on(store: Store) -> None:
    store.add(record(S.RUNNING), "user")
    executor = Executor()

    async def main() -> None:
        reconciler = Reconciler(store, {EngineKind.LLM: executor}, LIMITS)  # type: ignore[dict-item]
        executor.seen = fails(OSError(5, "Input/output error"))
        await ticked(reconciler)
        executor.seen = lambda: Observed(alive=True, ready=True)
        await ticked(reconciler)
        store.want(store.get("engine-a"), Wanted.STOPPED)
        await ticked(reconciler)

    asyncio.run(main())
    assert store.get("engine-a").state is S.STOPPING
    assert executor.stopped == [False]


def test_an_error_of_stopping_does_not_fail_the_engine(store: Store) -> None:
    store.add(record(S.RUNNING, Wanted.STOPPED), "user")
    executor = Executor()
    executor.seen = lambda: Observed(alive=True)
    executor.request_stop = fails(PermissionError())  # type: ignore[method-assign]
    asyncio.run(ticked(Reconciler(store, {EngineKind.LLM: executor}, LIMITS)))  # type: ignore[dict-item]
    assert store.get("engine-a").state is S.RUNNING


@pytest.mark.parametrize("error", [OperationalError("", {}, Exception("database or disk is full")), StaleWrite("engine-a")])
@pytest.mark.parametrize("launch_error", [None, OSError("no space")])
def test_a_write_that_fails_neither_stops_the_tick_nor_starts_an_engine_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, launch_error: Exception | None
) -> None:
    store.add(record(), "user")
    store.add(record(id="engine-b", kind=EngineKind.EMBEDDING), "user")
    broken, other = Executor(launch_error), Executor()
    other.seen = lambda: Observed(alive=other.launched > 0)
    executors: Any = {EngineKind.LLM: broken, EngineKind.EMBEDDING: other}
    move = store.move

    def move_b_only(engine: EngineRecord, *arguments: Any, **values: Any) -> EngineRecord:
        if engine.id == "engine-a":
            raise error
        return move(engine, *arguments, **values)

    async def main() -> None:
        reconciler = Reconciler(store, executors, LIMITS)
        with monkeypatch.context() as patched:
            patched.setattr(store, "move", move_b_only)
            await ticked(reconciler, ticks=1 if launch_error else 3)
        assert store.get("engine-a").state is S.QUEUED
        assert store.get("engine-b").state is S.STARTING
        broken.launch_error = None
        await ticked(reconciler)

    asyncio.run(main())
    assert (store.get("engine-a").state, store.get("engine-a").port) == (S.STARTING, 77)
    assert broken.launched == (2 if launch_error else 1)


def test_a_slow_start_is_not_begun_again_and_holds_up_nobody(store: Store) -> None:
    store.add(record(), "user")
    slow, other = Executor(), Executor()
    executors: Any = {EngineKind.LLM: slow, EngineKind.EMBEDDING: other}

    async def main() -> None:
        slow.release.clear()
        reconciler = Reconciler(store, executors, LIMITS)
        await reconciler.tick()
        store.add(record(id="engine-b", kind=EngineKind.EMBEDDING), "user")
        await reconciler.tick()
        while store.get("engine-b").state is not S.STARTING:
            await reconciler.tick()
        assert slow.launched == 1
        slow.release.set()
        await reconciler.close()

    asyncio.run(main())
    assert store.get("engine-a").state is S.STARTING


def test_a_launch_that_was_not_written_down_is_adopted(store: Store) -> None:
    store.add(record(), "user")
    executor = Executor()
    executor.seen = lambda: Observed(alive=True)
    asyncio.run(ticked(Reconciler(store, {EngineKind.LLM: executor}, LIMITS)))  # type: ignore[dict-item]
    assert (store.get("engine-a").state, store.get("engine-a").port, executor.launched) == (S.STARTING, 78, 0)


def test_a_running_engine_that_does_not_answer_is_silent_and_keeps_its_state(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(record(S.RUNNING), "user")
    executor = Executor()
    now = 0.0
    monkeypatch.setattr("sage.llm.control_plane.reconciler.time.monotonic", lambda: now)

    async def main() -> None:
        nonlocal now
        reconciler = Reconciler(store, {EngineKind.LLM: executor}, LIMITS)  # type: ignore[dict-item]
        executor.seen = lambda: Observed(alive=True)
        for _ in range(9):
            now += 4
            await ticked(reconciler)
        assert reconciler.silent_seconds("engine-a") == 32
        executor.seen = lambda: Observed(alive=True, ready=True)
        await ticked(reconciler)
        assert reconciler.silent_seconds("engine-a") == 0

    asyncio.run(main())
    assert store.get("engine-a").state is S.RUNNING


def test_whoever_has_lost_the_lease_writes_nothing(store: Store) -> None:
    store.add(record(), "user")
    executors: Any = {EngineKind.LLM: Executor()}
    asyncio.run(ticked(Reconciler(store, executors, LIMITS, lease="lost")))
    assert store.get("engine-a").state is S.QUEUED


@pytest.mark.parametrize(("resume", "wanted"), [(True, Wanted.RUNNING), (True, Wanted.STOPPED), (False, Wanted.RUNNING)])
@pytest.mark.parametrize("state", [S.STARTING, S.RUNNING])
def test_what_died_while_nobody_looked_is_resumed_if_that_is_set(
    store: Store, state: EngineState, resume: bool, wanted: Wanted
) -> None:
    store.add(record(state, wanted), "user")
    executor = Executor()
    limits = dataclasses.replace(LIMITS, resume=resume)
    executor.seen = lambda: Observed(alive=executor.launched > 0, reason=DEAD)

    async def main() -> None:
        reconciler = Reconciler(store, {EngineKind.LLM: executor}, limits)  # type: ignore[dict-item]
        await ticked(reconciler)
        is_resumed = resume and wanted is Wanted.RUNNING
        assert store.get("engine-a").state is (S.QUEUED if is_resumed else S.FAILED)
        await ticked(reconciler)
        executor.seen = lambda: Observed(alive=False, reason=DEAD)
        await ticked(reconciler)  # one that dies under its eyes is not started again and again
        assert (store.get("engine-a").state, executor.launched) == (S.FAILED, int(is_resumed))

    asyncio.run(main())
