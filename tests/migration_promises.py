"""Tests of opening and migrating a database. They must pass with every kind of database."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from engines import record
from sqlalchemy import Connection, DateTime, bindparam, create_engine, text
from store_promises import lease_of

import sage.llm.control_plane.store.database as module
from sage.common.errors import ConfigError
from sage.common.paths import get_user_paths
from sage.llm.client.types import DesiredState, EngineState, EventKind, RestartPolicy
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.store.database import REVISIONS, open_database
from sage.llm.control_plane.store.records import ServerState
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.store.tables import metadata

S, D = EngineState, DesiredState
#: For each engine: id, kind, desired state, state, port, requested port.
_ENGINES = [
    ("engine-served", "llm", "running", "running", 9000, 9000),
    ("engine-later", "embedding", "running", "starting", 9001, 9000),
    ("engine-trained", "finetune", "stopped", "stopping", None, None),
    ("engine-killed", "finetune", "stopped_by_force", "running", None, None),
    ("engine-queued", "llm", "running", "queued", None, None),
    ("engine-ended", "llm", "stopped", "stopped", 9000, 9000),
]
_AT = bindparam("at", type_=DateTime(timezone=True))
_INSERT_ENGINE = text(
    "INSERT INTO engines VALUES (:id, :kind, 'm', 'm', '{\"a\": 1}', :wanted, :state, 'null', :node, :port, "
    ":requested_port, 3, :at, :at)"
).bindparams(_AT)
_INSERT_EVENT = text(
    "INSERT INTO engine_events (engine_id, at, before, after, actor, reason) VALUES (:id, :at, :before, :after, 'u', '')"
).bindparams(_AT)


def make_old(url: str, revision: str, owner: str | None = None) -> None:
    """Create a database with the schema of an older version, and insert engines and their events."""
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    database = create_engine(url)
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        for number, engine in enumerate(_ENGINES):
            if revision != "0001" and engine[0] == "engine-later":
                engine = (*engine[:-1], None)  # noqa: PLW2901 - 0002 allows one active engine per port
            _insert(connection, engine, owner or "a-host", datetime(2026, 1, 1, number, tzinfo=UTC))
        if owner:
            connection.execute(text("INSERT INTO owner VALUES (0, :owner)"), {"owner": owner})
    database.dispose()


def _insert(connection: Connection, engine: tuple[Any, ...], node: str, at: datetime) -> None:
    engine_id, kind, wanted, state, port, requested_port = engine
    values = {"id": engine_id, "kind": kind, "wanted": wanted, "state": state, "port": port,
              "requested_port": requested_port, "node": node, "at": at}  # fmt: skip
    connection.execute(_INSERT_ENGINE, values)
    connection.execute(_INSERT_EVENT, {"id": engine_id, "at": at, "before": None, "after": "queued"})
    if state != "queued":
        connection.execute(_INSERT_EVENT, {"id": engine_id, "at": at, "before": "queued", "after": state})


class MigrationPromises:
    def test_a_new_database_has_the_tables_that_the_code_declares(self, database_url: str) -> None:
        with open_database(database_url).connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []

    @pytest.mark.parametrize("revision", ["0001", "0002"])
    def test_an_older_database_is_migrated(self, database_url: str, revision: str) -> None:
        node = open_state_folder()
        make_old(database_url, revision, owner=node if revision == "0002" else None)
        database = open_database(database_url)
        with database.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        store = Store(database)
        engines = {engine.id.removeprefix("engine-"): engine for engine in store.page(limit=10)[0]}
        assert list(engines) == ["served", "later", "trained", "killed", "queued", "ended"]
        assert {engine.node for engine in engines.values()} == {node}
        assert {name: (engine.state, engine.desired, engine.force) for name, engine in engines.items()} == {
            "served": (S.RUNNING, D.RUNNING, False),
            "later": (S.STARTING, D.RUNNING, False),
            "trained": (S.STOPPING, D.STOPPED, False),
            "killed": (S.RUNNING, D.STOPPED, True),
            "queued": (S.QUEUED, D.RUNNING, False),
            "ended": (S.STOPPED, D.STOPPED, False),
        }
        assert [engine.backend for engine in engines.values()] == [
            "transformers", "embedding", "trainer", "trainer", "transformers", "transformers",
        ]  # fmt: skip
        assert [engine.requested_port for engine in engines.values()] == [9000, None, None, None, None, 9000]
        served = engines["served"]
        assert (served.options, served.reason, served.version, served.restart_policy) == (
            {"a": 1},
            None,
            3,
            RestartPolicy.NO,
        )
        assert (served.first_event, served.last_event, served.created_at.hour) == (1, 2, 0)
        assert [event.kind for event in store.events(limit=2)] == [EventKind.CREATED, EventKind.TRANSITION]

    def test_each_process_of_an_older_version_becomes_a_server(self, database_url: str) -> None:
        make_old(database_url, "0002", owner="node-a")
        store = Store(open_database(database_url))
        servers = {server.id: server for server in store.servers("node-a")}
        paths = get_user_paths()
        assert {server.id: (server.handle, server.address) for server in servers.values()} == {
            "server-served": (f"{paths.state_dir}/engines/engine-served/process.lock", "127.0.0.1:9000"),
            "server-later": (f"{paths.state_dir}/engines/engine-later/process.lock", "127.0.0.1:9001"),
            "server-trained": (f"{paths.finetuned_dir}/task-trained/worker.lock", None),
            "server-killed": (f"{paths.finetuned_dir}/task-killed/worker.lock", None),
        }
        assert {server.state for server in servers.values()} == {ServerState.LAUNCHED}
        for engine in store.page(limit=10)[0]:
            assert engine.server_id in (None, f"server-{engine.id.removeprefix('engine-')}")
            assert (engine.server_id in servers) == (engine.state in (S.STARTING, S.RUNNING, S.STOPPING))

    def test_new_events_continue_the_numbering_of_an_older_database(self, database_url: str) -> None:
        make_old(database_url, "0002", owner="node-a")
        store = Store(open_database(database_url))
        before = store.last_event()
        lease = lease_of(store, "node-a")
        assert store.add(record(node="node-a"), "user", lease).first_event == before + 1
        ended = store.get("engine-ended")
        store.remove(ended, actor="user", lease=lease)
        assert [event.kind for event in store.events(limit=99, engine_id="engine-ended")] == [EventKind.REMOVED]

    def test_the_servers_of_an_older_version_are_not_shared_and_accept_any_model_name(self, database_url: str) -> None:
        make_old(database_url, "0002", owner="node-a")
        store = Store(open_database(database_url))
        assert {(host.shared, host.served_name, host.options) for host in store.servers("node-a")} == {(False, None, None)}
        engine = store.get("engine-served")
        assert (engine.dedicated, engine.base, engine.adapter, engine.revision, engine.served_as) == (
            False, None, None, 0, None,
        )  # fmt: skip

    def test_a_migration_that_fails_leaves_the_database_as_it_was(self, database_url: str) -> None:
        make_old(database_url, "0002", owner="node-a")
        with create_engine(database_url).begin() as connection:
            connection.execute(text("UPDATE engines SET kind = 'unknown' WHERE id = 'engine-queued'"))
        with pytest.raises(KeyError, match="unknown"):
            open_database(database_url)
        with create_engine(database_url).connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0002"
            assert connection.scalar(text("SELECT count(*) FROM engines")) == len(_ENGINES)
            assert connection.scalar(text("SELECT node FROM owner")) == "node-a"

    def test_a_database_of_a_newer_version_is_refused_and_not_changed(self, database_url: str) -> None:
        database = open_database(database_url)
        with database.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
        message = f"has schema 0099; this version of SAGE supports at most schema {REVISIONS[-1]}"
        with pytest.raises(ConfigError, match=message) as caught:
            open_database(database_url)
        assert caught.value.code == "database_newer"
        with database.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0099"
