"""The store on a real PostgreSQL: the tests that run on all databases, and tests of concurrent transactions."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from engines import record
from lease_promises import LeasePromises
from migration_promises import MigrationPromises
from outbox_promises import OutboxPromises
from postgres import PostgresServer
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from store_promises import ME, StorePromises, lease_of

from sage.common.errors import ConfigError
from sage.llm.client.types import DesiredState, EngineState, EventKind
from sage.llm.control_plane.store.check import check
from sage.llm.control_plane.store.database import REVISIONS, open_database
from sage.llm.control_plane.store.records import Lease
from sage.llm.control_plane.store.store import Store


@pytest.fixture
def database_url(postgres: PostgresServer) -> str:
    return postgres.create_database()


class TestStoreOnPostgres(StorePromises):
    pass


class TestOutboxOnPostgres(OutboxPromises):
    pass


class TestLeasesOnPostgres(LeasePromises):
    pass


class TestMigrationsOnPostgres(MigrationPromises):
    pass


def wait_for_lock(store: Store) -> None:
    """Wait until a transaction of this database waits for a lock."""
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    while True:
        with store._read() as connection:
            if connection.scalar(waiting):
                return
        time.sleep(0.01)


def test_a_takeover_waits_for_a_transaction_that_began_before_the_lease_expired(database_url: str) -> None:
    store, standby = (Store(open_database(database_url), lease_seconds=0.5) for _ in range(2))
    lease = lease_of(store)
    with ThreadPoolExecutor(1) as pool:
        with store._fenced(lease, "n") as connection:
            takeover = pool.submit(acquire_when_expired, standby)
            wait_for_lock(store)
            store._event(connection, "engine-a", EventKind.REMOVED, "user")
        taken = takeover.result()
    assert taken.fence > lease.fence
    assert [event.engine_id for event in standby.events(limit=9)] == ["engine-a"]


def test_a_control_plane_that_is_suspended_within_a_transaction_does_not_prevent_a_takeover(database_url: str) -> None:
    store, standby = (Store(open_database(database_url), lease_seconds=0.5) for _ in range(2))
    lease = lease_of(store)

    def write_slowly() -> None:
        with store._fenced(lease, "n") as connection:
            store._event(connection, "engine-a", EventKind.REMOVED, "user")
            assert acquire_when_expired(standby).fence > lease.fence  # the first control plane is idle during this call
            store._event(connection, "engine-a", EventKind.REMOVED, "user")

    with pytest.raises(SQLAlchemyError):
        write_slowly()
    assert standby.events(limit=9) == []


def acquire_when_expired(store: Store) -> Lease:
    while not (taken := store.acquire_lease("n", "standby", "another host", ME)):
        time.sleep(0.01)
    return taken


def test_a_reader_does_not_miss_the_event_of_a_slow_transaction(database_url: str) -> None:
    store = Store(open_database(database_url))
    lease, other = lease_of(store), lease_of(store, "other")
    engine = store.add(record(), "user", lease)
    slow_has_written, may_commit = Event(), Event()

    def slow() -> None:
        with store._fenced(other, "other") as connection:
            store._event(connection, "engine-slow", EventKind.REMOVED, "user")
            slow_has_written.set()
            may_commit.wait()

    with ThreadPoolExecutor(2) as pool:
        writes = [pool.submit(slow)]
        slow_has_written.wait()
        writes.append(pool.submit(store.set_desired, engine, DesiredState.STOPPED, force=False, actor="u", lease=lease))
        wait_for_lock(store)  # the second write waits; its event has the higher id
        assert store.last_event() == engine.first_event
        may_commit.set()
        for write in writes:
            write.result()
    assert [event.engine_id for event in store.events(engine.first_event, limit=9)] == ["engine-slow", "engine-a"]


def test_several_control_planes_can_open_an_empty_database_at_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(open_database(database_url)), range(4)))
    stores[0].add(record(), "user", lease_of(stores[0]))
    assert [store.get("engine-a").state for store in stores] == [EngineState.QUEUED] * 4


def test_the_error_for_an_unreachable_server_is_one_line_without_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        open_database("postgresql+psycopg://sage:hunter2@127.0.0.1:1/sage")
    assert caught.value.code == "database_unusable"
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Connection refused" in str(caught.value)


def test_the_check_of_a_database_reports_its_schema_and_the_difference_of_the_clocks(database_url: str) -> None:
    assert check(database_url).revision is None
    open_database(database_url).dispose()
    report = check(database_url)
    assert (report.fault, report.revision) == ("", REVISIONS[-1])
    assert abs(report.server_ahead_seconds) < 60
