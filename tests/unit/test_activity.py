"""Recording of requests to engines that are unloaded when idle."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from engines import record, server
from sqlalchemy import event
from store_promises import lease_of

from sage.llm.client.types import EngineState
from sage.llm.control_plane.activity import Activity
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import Route, RoutingTable
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store

S = EngineState


class World:
    """A store with one engine, and the statements that are sent to its database."""

    def __init__(self, folder: Path, state: EngineState, **values: object) -> None:
        database = open_database(f"sqlite:///{folder}/engines.db")
        self.store, self.table, self.wakes = Store(database), RoutingTable("n"), 0
        self.table.apply(self.store.add(record(state, **values), "user", lease_of(self.store)), None)
        self.activity = Activity(self.store, Pool("store", 1), self.table, self.wake)
        self.statements: list[str] = []
        event.listen(database, "before_cursor_execute", self.note)

    def note(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith("BEGIN"):
            self.statements.append(statement)

    def wake(self) -> None:
        self.wakes += 1

    def route(self) -> Route:
        route = self.table.get("engine-a")
        assert route
        return route

    def run(self, test: Callable[[Activity], Awaitable[None]]) -> None:
        asyncio.run(test(self.activity))


@pytest.mark.parametrize("state", [S.QUEUED, S.STARTING, S.RUNNING])
def test_a_request_to_an_engine_without_an_idle_stop_reads_no_database(tmp_path: Path, state: EngineState) -> None:
    w = World(tmp_path, state)

    async def test(activity: Activity) -> None:
        assert await activity.may_use(w.route()) == (state is S.RUNNING)
        assert w.statements == []

    w.run(test)


def test_only_the_first_of_many_requests_is_written_to_the_database(tmp_path: Path) -> None:
    w = World(tmp_path, S.RUNNING, idle_stop_minutes=5.0)

    async def test(activity: Activity) -> None:
        for _ in range(100):
            assert await activity.may_use(w.route())

    w.run(test)
    assert len(w.statements) == 1
    assert w.store.get("engine-a").last_request_at
    assert w.wakes == 0


def test_a_request_to_an_engine_that_was_paused_meanwhile_waits_and_wakes_the_engine_once(tmp_path: Path) -> None:
    w = World(tmp_path, S.PAUSED, idle_stop_minutes=5.0)
    outdated = dataclasses.replace(w.route(), state=S.RUNNING)  # the change feed has not reported the pause yet

    async def test(activity: Activity) -> None:
        assert not await activity.may_use(outdated)
        assert w.route().state is S.PAUSED
        assert not await activity.may_use(w.route())

    w.run(test)
    assert (len(w.statements), w.wakes) == (1, 1)


@pytest.mark.parametrize("known", [S.PAUSED, S.RUNNING])
def test_a_request_to_an_engine_that_another_control_plane_has_loaded_again_waits_for_its_address(
    tmp_path: Path, known: EngineState
) -> None:
    w = World(tmp_path, known, idle_stop_minutes=5.0)
    lease = lease_of(w.store)
    engine = w.store.get("engine-a")
    for state in (S.PAUSED, S.QUEUED, S.STARTING, S.RUNNING)[known is S.PAUSED :]:
        engine = w.store.transition(engine, state, actor="r", lease=lease)

    async def test(activity: Activity) -> None:
        assert not await activity.may_use(w.route())
        w.table.apply(w.store.get("engine-a"), server())  # the change feed reports the address
        assert await activity.may_use(w.route())

    w.run(test)
    assert w.route().address == "127.0.0.1:9000"


def test_a_paused_engine_is_woken_once_for_many_requests_that_another_engine_answers(tmp_path: Path) -> None:
    w = World(tmp_path, S.PAUSED, idle_stop_minutes=5.0)

    async def test(activity: Activity) -> None:
        for _ in range(10):
            activity.wake("engine-a")
        while not w.wakes:
            await asyncio.sleep(0.001)
        activity.wake("engine-unknown")

    w.run(test)
    assert (len(w.statements), w.wakes) == (1, 1)


def test_an_unexpected_error_does_not_end_the_recording_of_requests_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = World(tmp_path, S.RUNNING, idle_stop_minutes=5.0)
    monkeypatch.setattr("sage.llm.control_plane.activity._CHECK_SECONDS", 0)
    errors, touch = [KeyError("bug")], w.store.touch

    def touch_later(engine_id: str) -> object:
        if errors:
            raise errors.pop()
        return touch(engine_id)

    monkeypatch.setattr(w.store, "touch", touch_later)

    async def test(activity: Activity) -> None:
        activity.in_progress["engine-a"] = 1
        recording = asyncio.create_task(activity.run())
        async with asyncio.timeout(20):
            while not w.store.get("engine-a").last_request_at:
                await asyncio.sleep(0)
        recording.cancel()

    w.run(test)


def test_an_error_of_the_database_does_not_fail_a_request_to_a_running_engine(tmp_path: Path) -> None:
    w = World(tmp_path, S.RUNNING, idle_stop_minutes=5.0)
    with w.store._database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE engines RENAME TO aside")

    async def test(activity: Activity) -> None:
        assert await activity.may_use(w.route())

    w.run(test)
