"""Add the table of routes, and the columns that are needed to serve training runs and to stop idle engines.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("engines", sa.Column("idle_stop_minutes", sa.Float()))
    op.add_column("engines", sa.Column("last_request_at", sa.DateTime(timezone=True)))
    op.add_column("engines", sa.Column("backend_reason", sa.Text()))
    op.add_column("engines", sa.Column("serve", sa.JSON(none_as_null=True)))
    op.add_column("engine_events", sa.Column("route", sa.String()))
    op.create_table(
        "routes",
        sa.Column("node", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("engines", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("fallback", sa.Text()),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
