"""Add columns for servers that host several engines.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns. Existing servers are marked as not shared."""
    op.add_column("engines", sa.Column("dedicated", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("engines", sa.Column("base", sa.Text()))
    op.add_column("engines", sa.Column("adapter", sa.Text()))
    op.add_column("engines", sa.Column("form", sa.Text()))
    op.add_column("engines", sa.Column("revision", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("engines", sa.Column("served_as", sa.String()))
    op.create_index("ix_engines_server", "engines", ["server_id"])
    op.add_column("servers", sa.Column("options", sa.JSON(none_as_null=True)))
    op.add_column("servers", sa.Column("served_name", sa.String()))
    op.add_column("servers", sa.Column("shared", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("servers", sa.Column("max_adapters", sa.Integer()))
