"""The database tables. Every change of a table needs a migration in `migrations/versions/`."""

from datetime import datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

#: SQL condition for engines that are not stopped, completed or failed. The condition is literal text, because the database
#: uses a partial index only if the query has exactly the condition of the index.
ACTIVE = text("state NOT IN ('stopped', 'completed', 'failed')")

metadata = MetaData()
_Json = JSON(none_as_null=True)
_Time: DateTime = DateTime(timezone=True)

engines = Table(
    "engines",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("model", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("backend", String, nullable=False),
    Column("options", _Json, nullable=False),
    Column("metadata", _Json, nullable=False),
    Column("desired", String, nullable=False),
    Column("force", Boolean, nullable=False),
    Column("restart_policy", String, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", _Json),
    Column("figures", _Json),
    Column("node", String, nullable=False),
    Column("server_id", String),
    Column("requested_port", Integer),
    Column("devices", _Json),
    Column("reserved_bytes", BigInteger),
    Column("version", Integer, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("state_at", _Time, nullable=False),
    Column("first_event", BigInteger, nullable=False),
    Column("last_event", BigInteger, nullable=False),
    Column("dedicated", Boolean, nullable=False, server_default=text("false")),
    Column("base", Text),
    Column("base_version", String),
    Column("adapter", Text),
    Column("form", Text),
    Column("backend_reason", Text),
    Column("revision", Integer, nullable=False, server_default="0"),
    Column("served_as", String),
    Column("idle_stop_minutes", Float),
    Column("last_request_at", _Time),
    Column("serve", _Json),
    Column("merger_id", String),
    Column("merges", String),
    Column("on_busy", String, nullable=False, server_default="wait"),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("not_before", _Time),
    Column("queue_rank", Float),
    Column("paused_by", String),
    Column("least_bytes", BigInteger),
    Column("threads", Integer),
    Column("max_restarts", Integer, nullable=False, server_default="5"),
    Column("last_crash", String),
    # A requested port belongs to at most one active engine of a node.
    Index("ix_engines_active_port", "node", "requested_port", unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE),
    Index("ix_engines_active", "node", "first_event", sqlite_where=ACTIVE, postgresql_where=ACTIVE),
    Index("ix_engines_server", "server_id"),
    # Indexes for the paginated list of engines. A query reads a few ranges of one index. Each range is sorted like the list.
    Index("ix_engines_order", "first_event", unique=True),
    Index("ix_engines_state_kind", "state", "kind", "first_event"),
    Index("ix_engines_node_state_kind", "node", "state", "kind", "first_event"),
)

servers = Table(
    "servers",
    metadata,
    Column("id", String, primary_key=True),
    Column("node", String, nullable=False, index=True),
    Column("backend", String, nullable=False),
    Column("model", Text, nullable=False),
    Column("state", String, nullable=False),
    Column("handle", Text, nullable=False),
    Column("address", String),
    Column("devices", _Json),
    Column("reserved_bytes", BigInteger),
    Column("version", Integer, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("options", _Json),
    Column("served_name", String),
    Column("shared", Boolean, nullable=False, server_default=text("false")),
    Column("max_adapters", Integer),
    Column("model_version", String),
)

#: The change feed. Ids increase in the order of commits and are never reused.
events = Table(
    "engine_events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("engine_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("at", _Time, nullable=False),
    Column("before", String),
    Column("after", String),
    Column("actor", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("route", String),
    Index("ix_engine_events_engine", "engine_id", "id"),
    sqlite_autoincrement=True,
)

#: Webhook messages that are not delivered yet.
webhook_messages = Table(
    "webhook_messages",
    metadata,
    Column("event_id", BigInteger, primary_key=True, autoincrement=False),
    Column("endpoint", String, primary_key=True),  # hash of the URL
    Column("node", String, nullable=False),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
)

#: Routes: model names that refer to one or more engines of a node.
routes = Table(
    "routes",
    metadata,
    Column("node", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("engines", _Json, nullable=False),
    Column("fallback", Text),
    Column("updated_at", _Time, nullable=False),
)

#: The nodes that use this database. A node is a SAGE installation with its own state folder.
nodes = Table(
    "nodes",
    metadata,
    Column("id", String, primary_key=True),
    Column("host", String, nullable=False),
)

#: One row for each node. `fence` is the fencing token of the node's lease. Each control plane that takes over the lease
#: increments the token. Rows are never deleted, so that no token decreases.
leases = Table(
    "leases",
    metadata,
    Column("node", String, primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("holder", String),  # NULL: nobody holds the lease
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("pid_started", String, nullable=False),
    Column("url", Text, nullable=False),
    Column("expires_at", _Time, nullable=False),
)
#: Expiry of a lease that nobody holds: a time in the past.
NEVER_HELD = datetime.fromisoformat("2000-01-01T00:00:00+00:00")
