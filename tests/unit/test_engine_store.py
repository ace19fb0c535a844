"""The store on SQLite, and the opening of a database."""

import functools
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from engines import record
from lease_promises import LeasePromises
from migration_promises import MigrationPromises
from outbox_promises import OutboxPromises
from sqlalchemy import insert
from store_promises import StorePromises, lease_of

from sage.common.errors import ConfigError
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.store.tables import engines, events

S, K = EngineState, EngineKind


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/engines.db"


class TestStoreOnSqlite(StorePromises):
    pass


class TestOutboxOnSqlite(OutboxPromises):
    pass


class TestLeasesOnSqlite(LeasePromises):
    pass


class TestMigrationsOnSqlite(MigrationPromises):
    @pytest.fixture
    def database_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/engines.db"


def add(url: str) -> None:
    store = Store(open_database(url))
    store.add(record(), "user", lease_of(store))


def test_opening_the_database_again_keeps_its_rows(database_url: str) -> None:
    add(database_url)
    assert Store(open_database(database_url)).get("engine-a").model == "m"


def test_only_its_user_can_read_a_new_database_and_its_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    add(f"sqlite:///{tmp_path}/engines.db")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_database_that_many_processes_open_at_once_is_created_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(open_database(database_url)), range(4)))
    stores[0].add(record(), "user", lease_of(stores[0]))
    assert [len(store.page(limit=9)[0]) for store in stores] == [1, 1, 1, 1]


def steps(store: Store, call: Callable[[], object]) -> int:
    """Return the number of instructions that SQLite executes for a call, divided by 10. Other load does not change it."""
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1

    with store._database.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
    raw.set_progress_handler(count, 10)
    call()
    raw.set_progress_handler(None, 0)
    return counted


def test_no_read_becomes_slower_with_the_number_of_settled_engines(database_url: str) -> None:
    store = Store(open_database(database_url))
    lease = lease_of(store)
    living = [store.add(record(S.RUNNING, id=f"engine-{number}"), "user", lease) for number in range(10)]
    reads: dict[str, Callable[[], object]] = {
        "active": lambda: store.active("n"),
        "events": lambda: store.events(living[0].first_event, limit=9),
        "events of one": lambda: store.events(limit=9, engine_id="engine-3"),
        "last event": store.last_event,
        "get": lambda: store.get("engine-3"),
    }
    for order, after, node in product((False, True), (None, "engine-5"), (None, "n", "unknown")):
        for states, kinds in product((None, [S.RUNNING], [S.STOPPED, S.FAILED]), (None, [K.LLM], [K.EMBEDDING])):
            reads[f"page {order} {after} {node} {states} {kinds}"] = functools.partial(
                store.page, limit=5, newest_first=order, after=after, node=node, states=states, kinds=kinds
            )

    def measure(number: int) -> dict[str, int]:
        """Add settled engines until there are `number`, and measure all reads."""
        ids = range(store.last_event() + 1, number)
        rows = [vars(record(S.STOPPED, id=f"settled-{i}", kind=K.FINETUNE if i % 2 else K.LLM)) for i in ids]
        with store._write() as connection:
            connection.execute(
                insert(engines), [row | {"first_event": i, "last_event": i} for i, row in zip(ids, rows, strict=True)]
            )
            event = {"kind": "created", "at": datetime.now(UTC), "actor": "u", "reason": ""}
            connection.execute(insert(events), [event | {"engine_id": row["id"]} for row in rows])
        return {name: steps(store, read) for name, read in reads.items()}

    few, many = measure(300), measure(3000)
    assert {name: (few[name], many[name]) for name in few if many[name] > 1.5 * few[name] + 10} == {}


def test_a_missing_driver_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match="psycopg") as caught:
        open_database("postgresql://127.0.0.1/sage")
    assert "sage-llm-core[postgresql]" in caught.value.hint


def unusable(tmp_path: Path, url: str) -> str:
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage").write_bytes(b"garbage" * 1000)
    with pytest.raises(ConfigError) as caught:
        open_database(url.format(tmp=tmp_path))
    assert caught.value.code == "database_unusable"
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None  # a chained error would be logged
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "is not a SQLAlchemy URL"),
        ("sqlite:////proc/none/engines.db", "No such file or directory"),
        ("sqlite:///{tmp}/folder", "Is a directory"),
        ("sqlite:///{tmp}/garbage", "file is not a database"),
        ("nosuch://x", "nosuch is not supported; use sqlite or postgresql"),
        ("postgresql+nodriver://x", "sqlalchemy.dialects:postgresql.nodriver"),
    ],
)
def test_a_database_that_cannot_be_opened_is_reported_in_one_sentence_with_the_reason(
    tmp_path: Path, url: str, reason: str
) -> None:
    message = unusable(tmp_path, url)
    assert reason in message
    assert ("move it away" in message) == url.startswith("sqlite")


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://sage:hunter2@127.0.0.1:1/sage",
        "postgresql+nodriver://sage:hunter2@127.0.0.1:1/sage",
        "nosuch://127.0.0.1:1/sage?user=sage&password=hunter2",
        "sage:hunter2@127.0.0.1/sage",
        "nosuch://sage:hunter2@127.0.0.1:port/sage",
    ],
)
def test_no_error_contains_the_password(tmp_path: Path, url: str) -> None:
    assert "hunter2" not in unusable(tmp_path, url)
