import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from engines import record

from sage.common.errors import ConfigError, Conflict, NotFound
from sage.common.identity import ProcessIdentity
from sage.llm.client.types import EngineState, Reason, Wanted
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import StaleWrite, Store

S = EngineState
DEAD = Reason(code="engine_died", message="dead")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_database(f"sqlite:///{tmp_path}/state/engines.db"))


def test_every_transition_is_kept_with_its_reason_and_actor(store: Store) -> None:
    store.add(record(), "user")
    engine = store.move(store.get("engine-a"), S.STARTING, "reconciler", port=9)
    engine = store.move(engine, S.FAILED, "reconciler", DEAD)
    assert (engine.state, engine.reason, engine.port) == (S.FAILED, DEAD, 9)
    assert [(e.before, e.after, e.actor, e.reason) for e in store.events("engine-a")] == [
        (None, S.QUEUED, "user", ""), (S.QUEUED, S.STARTING, "reconciler", ""), (S.STARTING, S.FAILED, "reconciler", "dead"),
    ]  # fmt: skip
    assert store.list(active_only=True) == []


def test_a_stale_worker_changes_nothing(store: Store) -> None:
    store.add(record(), "user")
    stale = store.get("engine-a")
    store.want(stale, Wanted.STOPPED)
    with pytest.raises(StaleWrite):
        store.move(stale, S.STARTING, "reconciler")
    assert store.get("engine-a").state is S.QUEUED
    assert len(store.events("engine-a")) == 1


def test_an_engine_is_removed_with_its_events(store: Store) -> None:
    store.add(record(S.STOPPED), "user")
    store.remove(store.get("engine-a"))
    with pytest.raises(NotFound, match="No engine 'engine-a'"):
        store.get("engine-a")
    assert store.events("engine-a") == []


def test_engines_are_in_the_order_in_which_they_came_though_the_clock_was_set_back(store: Store) -> None:
    store.add(record(id="engine-b"), "user")
    store.add(record(id="engine-a", created_at=datetime.now(UTC) - timedelta(hours=1)), "user")
    store.move(store.get("engine-b"), S.STARTING, "reconciler")
    engines = store.list(active_only=True)
    assert [engine.id for engine in engines] == ["engine-b", "engine-a"]
    assert engines[0].last_event > engines[1].last_event


def test_one_port_is_promised_to_one_active_engine(store: Store) -> None:
    store.add(record(id="engine-a", requested_port=9000), "user")
    with pytest.raises(Conflict) as caught:
        store.add(record(id="engine-b", requested_port=9000), "user")
    assert (caught.value.code, caught.value.param) == ("port_taken", "port")
    stopped = store.move(store.get("engine-a"), S.STOPPED, "reconciler")
    store.add(record(id="engine-b", requested_port=9000), "user")
    with pytest.raises(Conflict, match="Port 9000 cannot be used"):
        store.move(stopped, S.QUEUED, "user")
    assert store.get("engine-a").state is S.STOPPED
    store.add(record(id="engine-c"), "user")
    store.add(record(id="engine-d"), "user")  # without a port, there is none to share


def test_of_many_starts_with_one_port_at_once_one_is_accepted(store: Store) -> None:
    def add(number: int) -> bool:
        try:
            store.add(record(id=f"engine-{number}", requested_port=9000), "user")
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(add, range(8))) == 1
    assert len(store.list()) == 1


def test_one_control_plane_reconciles_for_as_long_as_it_lives(store: Store) -> None:
    me, dead = ProcessIdentity.of(1), ProcessIdentity(1, "an earlier boot/5")
    assert store.hold_lease("a", "host", me)
    assert store.hold_lease("a", "host", me)
    assert not store.hold_lease("b", "host", me)
    assert not store.hold_lease("b", "other host", me)
    assert not store.hold_lease("c", "host", dead)
    store.release_lease("a")
    assert store.hold_lease("dead", "host", dead)
    assert store.hold_lease("b", "host", me)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_takes_the_lease_from_nobody_who_lives(
    store: Store, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    me = ProcessIdentity.of(1)
    assert store.hold_lease("a", "host", me)

    class Set(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr("sage.llm.control_plane.store.store.datetime", Set)
    assert not store.hold_lease("b", "host", me)
    assert store.hold_lease("a", "host", me)


def test_a_write_is_refused_to_whoever_has_lost_the_lease(store: Store) -> None:
    store.add(record(), "user")
    store.hold_lease("mine", "host", ProcessIdentity.of(1))
    with pytest.raises(StaleWrite):
        store.move(store.get("engine-a"), S.STARTING, "reconciler", lease="another")
    assert store.move(store.get("engine-a"), S.STARTING, "reconciler", lease="mine").state is S.STARTING


def test_a_database_belongs_to_one_state_folder(store: Store) -> None:
    store.add(record(), "user")
    store.claim("node-a", "")
    store.claim("node-a", "")
    assert store.get("engine-a").node == "node-a"
    with pytest.raises(ConfigError) as caught:
        store.claim("node-b", "It is {owner}'s.")
    assert (caught.value.code, caught.value.hint) == ("database_in_use", "It is node-a's.")


def test_opening_the_database_again_keeps_what_it_holds(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/engines.db"
    Store(open_database(url)).add(record(), "user")
    assert Store(open_database(url)).get("engine-a").model == "m"


def test_a_new_database_can_be_read_by_its_user_only_and_its_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Store(open_database(f"sqlite:///{tmp_path}/engines.db")).add(record(), "user")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_database_that_is_opened_by_many_at_once_is_made_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/engines.db"
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(open_database(url)), range(4)))
    stores[0].add(record(), "user")
    assert [len(store.list()) for store in stores] == [1, 1, 1, 1]


def test_a_database_of_the_first_version_is_taken_over_with_one_engine_a_port(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine, text

    import sage.llm.control_plane.store.database as module

    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    url = f"sqlite:///{tmp_path}/engines.db"
    with create_engine(url).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for name, state, hour in (("a", "running", 2), ("b", "running", 1), ("c", "stopped", 0)):
            connection.execute(text(
                "INSERT INTO engines VALUES (:id, 'llm', 'm', 'm', '{}', 'running', :state, NULL, 'a-host', 9000, 9000, 1, "
                ":at, :at)"), {"id": name, "state": state, "at": f"2026-01-01 0{hour}:00:00.000000"})  # fmt: skip
    store = Store(open_database(url))
    store.claim("node-a", "")
    assert {name: store.get(name).requested_port for name in "abc"} == {"a": None, "b": 9000, "c": 9000}
    assert {store.get(name).node for name in "abc"} == {"node-a"}


def test_a_database_of_a_newer_version_is_told_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "engines.db"
    open_database(f"sqlite:///{path}")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '0099'")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="has schema 0099, and this version of SAGE knows 0002 at most") as caught:
        open_database(f"sqlite:///{path}")
    assert caught.value.code == "database_newer"
    assert path.read_bytes() == before


def unusable(tmp_path: Path, url: str) -> str:
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage").write_bytes(b"garbage" * 1000)
    with pytest.raises(ConfigError) as caught:
        open_database(url.format(tmp=tmp_path))
    assert caught.value.code == "database_unusable"
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None  # what is chained would be logged
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "is not a SQLAlchemy URL"),
        ("sqlite:////proc/none/engines.db", "No such file or directory"),
        ("sqlite:///{tmp}/folder", "Is a directory"),
        ("sqlite:///{tmp}/garbage", "file is not a database"),
        ("nosuch://x", "sqlalchemy.dialects:nosuch"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence_with_the_reason(tmp_path: Path, url: str, said: str) -> None:
    assert said in unusable(tmp_path, url)


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://sage:hunter2@127.0.0.1:1/sage",
        "nosuch://127.0.0.1:1/sage?user=sage&password=hunter2",
        "sage:hunter2@127.0.0.1/sage",
        "nosuch://sage:hunter2@127.0.0.1:port/sage",
    ],
)
def test_a_password_is_in_no_error(tmp_path: Path, url: str) -> None:
    assert "hunter2" not in unusable(tmp_path, url)


def test_what_the_database_refuses_is_told_without_its_values(store: Store) -> None:
    store.add(record(options={"api": "hunter2"}), "user")
    with pytest.raises(Exception, match="UNIQUE") as caught:
        store.add(record(options={"api": "hunter2"}), "user")
    assert "hunter2" not in str(caught.value)
