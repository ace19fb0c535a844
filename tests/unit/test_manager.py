"""The manager with a real store and engines without processes: standby, other nodes, and an idle control plane."""

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from sqlalchemy import event

from sage.common.errors import Conflict, Overloaded
from sage.common.identity import ProcessIdentity
from sage.common.settings import load_settings
from sage.llm.client.types import EngineKind, EngineState, StartRequest
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.routing import Route
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store

S = EngineState


def stored(node: str, *ids: str) -> Store:
    """Add stopped engines of a node to the store, and return the store."""
    store = Store(open_database(load_settings().store_url))
    store.register_node(node, "host")
    lease = store.acquire_lease(node, "another", "host", ProcessIdentity.of(1))
    assert lease
    for engine_id in ids:
        store.add(record(S.STOPPED, id=engine_id, node=node, figures={}), "user", lease)
    store.release_lease(lease)
    return store


def managed(test: Callable[..., Awaitable[None]], *standby: bool) -> None:
    """Open a manager of this node for each value of `standby`, and run a test with the managers."""

    async def main() -> None:
        managers = [ControlPlaneManager(load_settings(), standby=expected) for expected in standby]
        for manager in managers:
            await manager.open()
        try:
            await asyncio.wait_for(test(*managers), 60)
        finally:
            for manager in managers:
                await manager.close()

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(4))
def test_a_control_plane_that_was_just_woken_closes_at_once(
    sage_home: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setenv("SAGE_RECONCILE_SECONDS", "60")

    async def test() -> None:
        manager = ControlPlaneManager(load_settings())
        await manager.open()
        while not manager._woken._waiters:
            await asyncio.sleep(0.01)
        manager._woken.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await manager.close()

    asyncio.run(test())


def changing(manager: ControlPlaneManager, engine_id: str) -> list[Awaitable[Any]]:
    return [
        manager.stop_engine(engine_id),
        manager.stop_engine(engine_id, force=True),
        manager.resume_engine(engine_id),
        manager.pause_engine(engine_id),
        manager.remove_engine(engine_id),
    ]


def test_an_engine_of_another_node_is_listed_and_cannot_be_changed() -> None:
    store = stored("node-b", "engine-b")
    stored(open_state_folder(), "engine-a")
    before = store.get("engine-b")

    async def test(manager: ControlPlaneManager) -> None:
        assert [engine.id for engine in await manager.list_engines()] == ["engine-b", "engine-a"]
        assert (await manager.get_engine("engine-b")).node == "node-b"
        assert [event.engine_id for event in await manager.get_events("engine-b")] == ["engine-b"]
        assert await manager.list_active() == []
        refused = [*changing(manager, "engine-b"), manager.get_logs("engine-b"), manager.get_training_steps("engine-b")]
        for call in refused:
            with pytest.raises(Conflict, match="node-b") as error:
                await call
            assert error.value.code == "other_node"

    managed(test, False)
    assert store.get("engine-b") == before


def test_a_standby_reads_everything_and_changes_nothing() -> None:
    store = stored(open_state_folder(), "engine-a", "engine-b")
    before = store.get("engine-a")

    async def test(active: ControlPlaneManager, standby: ControlPlaneManager) -> None:
        assert (active.role, standby.role) == ("active", "standby")
        for manager in (active, standby):
            page = await manager.page_engines(limit=1, newest_first=True)
            assert ([engine.id for engine in page.data], page.has_more) == (["engine-b"], True)
            assert (await manager.get_engine("engine-a")).state is S.STOPPED
            assert [event.id for event in await manager.get_events("engine-a")] == [before.first_event]
            assert len(await manager.changes(0, 10)) == 2
            assert await manager.last_change() == store.last_event()
            assert sum((await manager.counts()).values()) == 2
            assert await manager.get_logs("engine-a") == []
            assert await manager.get_training_steps("engine-a") == []
            assert manager.served() == []
        for call in (*changing(standby, "engine-a"), standby.start_engine(StartRequest(model="m"))):
            with pytest.raises(Overloaded) as error:
                await call
            assert error.value.code == "standby"

    managed(test, False, True)
    assert store.get("engine-a") == before


def test_a_request_uses_the_state_that_an_engine_has_after_the_request_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = record(S.STARTING, node=open_state_folder())
    running = dataclasses.replace(engine, state=S.RUNNING, version=2)

    async def test(manager: ControlPlaneManager) -> None:
        manager._routing.apply(engine, None)

        async def may_use(route: Route) -> bool:
            manager._routing.apply(running, server())
            return route.state is S.RUNNING

        monkeypatch.setattr(manager._activity, "may_use", may_use)
        assert (await manager.running("m", EngineKind.LLM, 600)).address == "127.0.0.1:9000"

    managed(test, False)


def test_an_idle_control_plane_only_writes_renewals_of_its_lease() -> None:
    stored(open_state_folder(), "engine-a")
    reads = 0
    writes: list[str] = []

    async def test(manager: ControlPlaneManager) -> None:
        def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            nonlocal reads
            if threading.current_thread().name.startswith("lease"):
                return
            if statement.lstrip().startswith("SELECT"):
                reads += 1
            elif statement != "BEGIN":
                writes.append(statement)

        event.listen(manager._store._database, "before_cursor_execute", count)
        while reads < 30:  # several ticks, and several reads of the change feed
            await asyncio.sleep(0.01)

    managed(test, False)
    assert writes == []
