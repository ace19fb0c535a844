import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import record
from sqlalchemy.exc import OperationalError

from sage.common.errors import SageError
from sage.llm.client.types import EngineKind, EngineState, Reason, Wanted
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.reconciler import Limits, Reconciler
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import EngineRecord, StaleWrite, Store

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20)
DEAD = Reason(code="engine_died", message="dead")


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
