"""Tests of leases that every database must pass. The test classes of each database inherit these tests."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from engines import record, server
from sqlalchemy import update
from store_promises import ME, Stored, lease_of

from sage.common.identity import ProcessIdentity
from sage.llm.client.types import DesiredState, EngineState
from sage.llm.control_plane.store.clock import lease_clock
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import Lease
from sage.llm.control_plane.store.store import LEASE_SECONDS, LeaseLost, StaleWrite, Store
from sage.llm.control_plane.store.tables import leases

S = EngineState
EXITED = ProcessIdentity(1, "an earlier boot/5")


def expire(store: Store, in_seconds: float = -1.0) -> None:
    """Let all leases expire `in_seconds` from now, as if the database's clock had been changed."""
    with store._write() as connection:
        connection.execute(update(leases).values(expires_at=lease_clock(in_seconds)))


class LeasePromises(Stored):
    def test_one_control_plane_holds_the_lease_of_a_node(self, store: Store) -> None:
        lease = lease_of(store, holder="a")
        assert store.acquire_lease("n", "b", "host", ME) is None
        assert store.acquire_lease("n", "b", "another host", ME) is None
        assert store.renew_lease(lease, "a")
        assert not store.renew_lease(lease, "b")
        expire(store)
        taken = store.acquire_lease("n", "b", "another host", ME, "http://127.0.0.1:1")
        assert taken
        assert taken.fence > lease.fence
        assert not store.renew_lease(lease, "a")
        leader = store.leader("n")
        assert leader
        assert (leader.holder, leader.host, leader.url) == ("b", "another host", "http://127.0.0.1:1")

    def test_if_a_process_on_the_same_host_has_exited_its_lease_is_free_at_once(self, store: Store) -> None:
        store.register_node("n", "host")
        assert store.acquire_lease("n", "a", "host", EXITED)
        assert store.acquire_lease("n", "b", "another host", ME) is None
        assert store.acquire_lease("n", "b", "host", ME)

    def test_a_released_lease_is_free_at_once_and_the_next_lease_has_a_higher_fence(self, store: Store) -> None:
        first = lease_of(store, holder="a")
        store.release_lease(first)
        assert store.leader("n") is None
        second = store.acquire_lease("n", "b", "host", ME)
        assert second
        store.release_lease(first)  # releasing a lease that has been lost has no effect
        store.register_node("n", "host")  # the node starts again
        third = store.acquire_lease("n", "b", "host", ME)
        assert third
        assert first.fence < second.fence < third.fence

    def test_if_many_holders_request_a_free_lease_at_once_only_one_gets_the_lease(self, store: Store) -> None:
        store.register_node("n", "host")
        for _ in range(5):
            with ThreadPoolExecutor(4) as pool:
                taken = list(pool.map(lambda holder: store.acquire_lease("n", holder, "host", ME), "abcd"))
            [lease] = [lease for lease in taken if lease]
            store.release_lease(lease)

    def test_a_suspended_control_plane_writes_nothing_after_another_one_took_over(
        self, store: Store, lease: Lease, database_url: str
    ) -> None:
        queued = store.add(record(), "user", lease)
        starting = store.add(record(id="engine-b"), "user", lease)
        starting = store.transition(starting, S.STARTING, actor="r", lease=lease, put_server=server(), server_id="server-a")
        stopped = store.add(record(S.STOPPED, id="engine-c"), "user", lease)
        [its_server] = store.servers("n")
        expire(store)  # as if the process had been suspended between reading and writing
        standby = Store(open_database(database_url))
        taken = standby.acquire_lease("n", "standby", "host", ME)
        assert taken
        before = [standby.page(limit=9), standby.servers("n"), standby.events(limit=99)]
        for write in (
            lambda: store.add(record(id="engine-d"), "user", lease),
            lambda: store.transition(queued, S.STARTING, actor="r", lease=lease, put_server=server(id="server-b")),
            lambda: store.transition(starting, S.FAILED, actor="r", lease=lease, leave_server="server-a"),
            lambda: store.set_desired(queued, DesiredState.STOPPED, force=False, actor="user", lease=lease),
            lambda: store.update_server(its_server, lease=lease, address=None),
            lambda: store.remove(stopped, actor="user", lease=lease),
        ):
            with pytest.raises(LeaseLost):
                write()
        store.release_lease(lease)
        assert before == [standby.page(limit=9), standby.servers("n"), standby.events(limit=99)]
        standby.transition(queued, S.STARTING, actor="r", lease=taken)

    def test_an_expired_lease_writes_nothing_until_it_is_renewed(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        expire(store)
        assert store.leader("n") is None
        with pytest.raises(LeaseLost):
            store.transition(engine, S.STARTING, actor="r", lease=lease)
        assert store.renew_lease(lease, "holder")
        store.transition(engine, S.STARTING, actor="r", lease=lease)

    def test_a_lease_can_be_acquired_after_the_clock_was_set_back(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        expire(store, 3600)
        assert store.leader("n") is None
        with pytest.raises(LeaseLost):
            store.transition(engine, S.STARTING, actor="r", lease=lease)
        assert store.acquire_lease("n", "b", "another host", ME)
        expire(store, 2 * LEASE_SECONDS - 1)  # this expiry is possible after a renewal
        assert store.acquire_lease("n", "c", "another host", ME) is None

    def test_a_node_writes_its_own_rows_only(self, store: Store, lease: Lease) -> None:
        other = lease_of(store, "other")
        engine = store.add(record(), "user", lease)
        engine = store.transition(engine, S.STARTING, actor="r", lease=lease, put_server=server(), server_id="server-a")
        [its_server] = store.servers("n")
        for write in (
            lambda: store.add(record(id="engine-b"), "user", other),
            lambda: store.transition(engine, S.FAILED, actor="r", lease=other),
            lambda: store.set_desired(engine, DesiredState.STOPPED, force=True, actor="user", lease=other),
            lambda: store.update_server(its_server, lease=other, address=None),
            lambda: store.remove(engine, actor="user", lease=other),
            lambda: store.transition(replace(engine, node="other"), S.FAILED, actor="r", lease=other),
        ):
            with pytest.raises(StaleWrite):
                write()
        assert store.get("engine-a") == engine
        assert (store.servers("n"), store.servers("other"), store.active("other")) == ([its_server], [], [])
