"""Add servers, nodes with one lease each, and events that are kept after their engines are removed.

Revision ID: 0003
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from sage.common.paths import get_user_paths
from sage.llm.control_plane.node import open_state_folder

revision = "0003"
down_revision = "0002"

_ACTIVE = sa.text("state NOT IN ('stopped', 'completed', 'failed')")
_JSON = sa.JSON(none_as_null=True)
_TIME: sa.DateTime = sa.DateTime(timezone=True)
_BACKENDS = {"llm": "transformers", "embedding": "embedding", "finetune": "trainer"}
_ROWS_AT_ONCE = 1000

_OLD_ENGINES = sa.table(
    "engines",
    *map(sa.column, ("id", "kind", "model", "name", "wanted", "state", "node", "port", "requested_port", "version")),
    *(sa.column(name, _JSON) for name in ("options", "reason")),
    *(sa.column(name, _TIME) for name in ("created_at", "state_at")),
)
_OLD_EVENTS = sa.table(
    "engine_events", *map(sa.column, ("id", "engine_id", "before", "after", "actor", "reason")), sa.column("at", _TIME)
)


def upgrade() -> None:
    connection = op.get_bind()
    events = [row._asdict() for row in connection.execute(sa.select(_OLD_EVENTS).order_by(_OLD_EVENTS.c.id))]
    first = {event["engine_id"]: event["id"] for event in reversed(events)}
    last = {event["engine_id"]: event["id"] for event in events}
    # Engines without events are not copied.
    engines = [row._asdict() for row in connection.execute(sa.select(_OLD_ENGINES)) if row.id in first]
    node = connection.scalar(sa.text("SELECT node FROM owner"))
    if node is None and engines:  # no control plane has stored the node id yet
        node = open_state_folder()
    for table in ("engine_events", "engines", "leases", "owner"):
        op.drop_table(table)
    tables = _create_tables()
    for engine in engines:
        engine |= {"node": node, "first_event": first[engine["id"]], "last_event": last[engine["id"]]}
    with_process = [engine for engine in engines if engine["state"] in ("starting", "running", "stopping")]
    _insert(tables["engines"], [_engine(engine) for engine in engines])
    _insert(tables["servers"], [_server(engine) for engine in with_process])
    _insert(tables["engine_events"], [_event(event) for event in events])
    _insert(tables["nodes"], [{"id": node, "host": ""}] if node else [])
    if events and connection.dialect.name == "postgresql":
        op.execute(f"SELECT setval(pg_get_serial_sequence('engine_events', 'id'), {events[-1]['id']})")


def _insert(table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        op.get_bind().execute(table.insert(), rows[start : start + _ROWS_AT_ONCE])


def _engine(old: Mapping[str, Any]) -> dict[str, Any]:
    has_process = old["state"] in ("starting", "running", "stopping")
    kept = {name: value for name, value in old.items() if name not in ("wanted", "port")}
    return kept | {
        "backend": _BACKENDS[old["kind"]],
        "metadata": {},
        "desired": "running" if old["wanted"] == "running" else "stopped",
        "force": old["wanted"] == "stopped_by_force",
        "restart_policy": "no",
        "restarts": 0,
        "server_id": _server_id(old) if has_process else None,
    }


def _event(old: Mapping[str, Any]) -> dict[str, Any]:
    return {**old, "kind": "transition" if old["before"] else "created"}


def _server(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the server of an engine that has a process. The handle is the path of the lock that the process holds."""
    suffix = engine["id"].removeprefix("engine-")
    if engine["kind"] == "finetune":
        lock = get_user_paths().finetuned_dir / f"task-{suffix}" / "worker.lock"
    else:
        lock = get_user_paths().state_dir / "engines" / engine["id"] / "process.lock"
    return {
        "id": _server_id(engine),
        "node": engine["node"],
        "backend": _BACKENDS[engine["kind"]],
        "model": engine["model"],
        "state": "launched",
        "handle": str(lock),
        "address": f"127.0.0.1:{engine['port']}" if engine["port"] else None,
        "version": 1,
        "created_at": engine["state_at"],
    }


def _server_id(engine: Mapping[str, Any]) -> str:
    return f"server-{engine['id'].removeprefix('engine-')}"


def _create_tables() -> dict[str, sa.Table]:
    return {
        "engines": _create_engines(),
        "servers": op.create_table(
            "servers",
            sa.Column("id", sa.String(), primary_key=True),
            sa.Column("node", sa.String(), nullable=False, index=True),
            sa.Column("backend", sa.String(), nullable=False),
            sa.Column("model", sa.Text(), nullable=False),
            sa.Column("state", sa.String(), nullable=False),
            sa.Column("handle", sa.Text(), nullable=False),
            sa.Column("address", sa.String()),
            sa.Column("devices", _JSON),
            sa.Column("reserved_bytes", sa.BigInteger()),
            sa.Column("version", sa.Integer(), nullable=False),
            sa.Column("created_at", _TIME, nullable=False),
        ),
        "engine_events": _create_events(),
        "nodes": op.create_table(
            "nodes", sa.Column("id", sa.String(), primary_key=True), sa.Column("host", sa.String(), nullable=False)
        ),
        "leases": op.create_table(
            "leases",
            sa.Column("node", sa.String(), primary_key=True),
            sa.Column("fence", sa.BigInteger(), nullable=False),
            sa.Column("holder", sa.String()),
            sa.Column("host", sa.String(), nullable=False),
            sa.Column("pid", sa.Integer(), nullable=False),
            sa.Column("pid_started", sa.String(), nullable=False),
            sa.Column("url", sa.Text(), nullable=False),
            sa.Column("expires_at", _TIME, nullable=False),
        ),
    }


def _create_engines() -> sa.Table:
    table = op.create_table(
        "engines",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("backend", sa.String(), nullable=False),
        sa.Column("options", _JSON, nullable=False),
        sa.Column("metadata", _JSON, nullable=False),
        sa.Column("desired", sa.String(), nullable=False),
        sa.Column("force", sa.Boolean(), nullable=False),
        sa.Column("restart_policy", sa.String(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", _JSON),
        sa.Column("figures", _JSON),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("server_id", sa.String()),
        sa.Column("requested_port", sa.Integer()),
        sa.Column("devices", _JSON),
        sa.Column("reserved_bytes", sa.BigInteger()),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("state_at", _TIME, nullable=False),
        sa.Column("first_event", sa.BigInteger(), nullable=False),
        sa.Column("last_event", sa.BigInteger(), nullable=False),
    )
    active: dict[str, Any] = {"sqlite_where": _ACTIVE, "postgresql_where": _ACTIVE}
    op.create_index("ix_engines_active_port", "engines", ["node", "requested_port"], unique=True, **active)
    op.create_index("ix_engines_active", "engines", ["node", "first_event"], **active)
    op.create_index("ix_engines_order", "engines", ["first_event"], unique=True)
    op.create_index("ix_engines_state_kind", "engines", ["state", "kind", "first_event"])
    op.create_index("ix_engines_node_state_kind", "engines", ["node", "state", "kind", "first_event"])
    return table


def _create_events() -> sa.Table:
    table = op.create_table(
        "engine_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("engine_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("before", sa.String()),
        sa.Column("after", sa.String()),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_engine_events_engine", "engine_events", ["engine_id", "id"])
    return table
