"""Add the table `owner`, allow at most one active engine per port, and store in each lease which process holds the lease.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ACTIVE = "state NOT IN ('stopped', 'completed', 'failed')"


def upgrade() -> None:
    op.create_table(
        "owner",
        sa.Column("slot", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("node", sa.String(), nullable=False),
    )
    op.execute(  # if several active engines have the same port, only the oldest engine keeps the port
        f"UPDATE engines SET requested_port = NULL WHERE {_ACTIVE} AND EXISTS (SELECT 1 FROM engines AS other "  # noqa: S608
        f"WHERE other.requested_port = engines.requested_port AND other.id <> engines.id AND other.{_ACTIVE} "
        "AND (other.created_at < engines.created_at OR (other.created_at = engines.created_at AND other.id < engines.id)))"
    )
    op.create_index(
        "ix_engines_active_port",
        "engines",
        ["requested_port"],
        unique=True,
        sqlite_where=sa.text(_ACTIVE),
        postgresql_where=sa.text(_ACTIVE),
    )
    op.drop_table("leases")
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("pid_started", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    op.drop_index("ix_engines_active_port", "engines")
    op.drop_table("owner")
    op.drop_table("leases")
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("pid_start_time", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
    )
