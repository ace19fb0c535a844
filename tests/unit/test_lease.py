"""LeaseKeeper: only one of several control planes of a node is active, and another control plane can take over."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import record
from lease_promises import expire

from sage.llm.control_plane import lease as module
from sage.llm.control_plane.lease import LeaseKeeper
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import Lease
from sage.llm.control_plane.store.store import LEASE_SECONDS, LeaseLost, Store

SHORT_SECONDS = 0.4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_database(f"sqlite:///{tmp_path}/engines.db"), lease_seconds=SHORT_SECONDS)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_takeover_takes_less_than_10_seconds() -> None:
    assert LEASE_SECONDS * (1 + module._LOOK) < 10
    assert LEASE_SECONDS * module._RENEW <= 2


def test_a_standby_takes_over_from_a_suspended_control_plane_which_then_writes_nothing(store: Store) -> None:
    async def run() -> None:
        changes: list[Lease | None] = []
        active, standby = LeaseKeeper(store, "n", "http://a", changes.append), LeaseKeeper(store, "n", "http://b")
        await active.open()
        await standby.open()
        held = active.lease
        assert held
        assert standby.lease is None
        leader = store.leader("n")
        assert leader
        assert leader.url == "http://a"
        engine = store.add(record(), "user", held)
        assert active._task
        active._task.cancel()  # as if suspended: the lease is not renewed, and its holder does not know this
        await until(lambda: standby.lease)
        assert active.lease is None
        with pytest.raises(LeaseLost):
            store.remove(engine, actor="user", lease=held)
        await active._step()  # as if continued after the suspension
        assert (active.lease, changes) == (None, [held, None])
        await standby.close()
        await active.close()

    asyncio.run(run())


def test_a_standby_takes_over_when_the_active_one_closes(store: Store) -> None:
    async def run() -> None:
        active, standby = LeaseKeeper(store, "n", ""), LeaseKeeper(store, "n", "")
        await active.open()
        await standby.open()
        first = active.lease
        assert first
        await active.close()
        assert active.lease is None
        await until(lambda: standby.lease)
        assert standby.lease
        assert standby.lease.fence > first.fence
        await standby.close()
        assert store.leader("n") is None

    asyncio.run(run())


def test_a_lease_is_renewed_for_as_long_as_its_control_plane_lives(store: Store) -> None:
    async def run() -> None:
        keeper = LeaseKeeper(store, "n", "")
        await keeper.open()
        held = keeper.lease
        for _ in range(3):
            expire(store, 0.01)
            await until(lambda: store.leader("n") is None)
            await until(lambda: store.leader("n"))
        await until(lambda: keeper.lease)
        assert keeper.lease == held
        await keeper.close()

    asyncio.run(run())


def test_access_to_an_unreachable_database_is_retried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        keeper = LeaseKeeper(store, "n", "")
        await keeper.open()

        def fail(*_: object) -> bool:
            raise OSError("no route to host")

        with monkeypatch.context() as broken:
            broken.setattr(store, "renew_lease", fail)
            await until(lambda: keeper.lease is None)
        await until(lambda: keeper.lease)
        await keeper.close()

    asyncio.run(run())
