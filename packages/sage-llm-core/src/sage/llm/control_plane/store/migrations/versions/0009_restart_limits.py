"""Add each engine's maximum number of restarts, and the training step at which a run last crashed.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("engines", sa.Column("max_restarts", sa.Integer(), nullable=False, server_default="5"))
    op.add_column("engines", sa.Column("last_crash", sa.String()))
