"""Add columns for three features: engines wait for memory, make room for other engines, and share the CPU cores.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("engines", sa.Column("on_busy", sa.String(), nullable=False, server_default="wait"))
    op.add_column("engines", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("engines", sa.Column("not_before", sa.DateTime(timezone=True)))
    op.add_column("engines", sa.Column("queue_rank", sa.Float()))
    op.add_column("engines", sa.Column("paused_by", sa.String()))
    op.add_column("engines", sa.Column("least_bytes", sa.BigInteger()))
    op.add_column("engines", sa.Column("threads", sa.Integer()))
