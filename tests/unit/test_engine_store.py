"""The store on SQLite, and how a database is opened."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import record
from migration_promises import MigrationPromises
from store_promises import StorePromises, lease_of

from sage.common.errors import ConfigError
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/engines.db"


class TestStoreOnSqlite(StorePromises):
    pass


class TestMigrationsOnSqlite(MigrationPromises):
    @pytest.fixture
    def database_url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/engines.db"


def add(url: str) -> None:
    store = Store(open_database(url))
    store.add(record(), "user", lease_of(store))


def test_opening_the_database_again_keeps_what_it_holds(database_url: str) -> None:
    add(database_url)
    assert Store(open_database(database_url)).get("engine-a").model == "m"


def test_a_new_database_can_be_read_by_its_user_only_and_its_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    add(f"sqlite:///{tmp_path}/engines.db")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_database_that_is_opened_by_many_at_once_is_created_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store(open_database(database_url)), range(4)))
    stores[0].add(record(), "user", lease_of(stores[0]))
    assert [len(store.page(limit=9)[0]) for store in stores] == [1, 1, 1, 1]


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
        ("nosuch://x", "sqlalchemy.dialects:nosuch"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence_with_the_reason(tmp_path: Path, url: str, reason: str) -> None:
    assert reason in unusable(tmp_path, url)


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
