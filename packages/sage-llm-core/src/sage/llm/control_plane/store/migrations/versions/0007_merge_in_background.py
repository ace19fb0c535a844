"""Add columns for adapters that are merged in the background.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("engines", sa.Column("merger_id", sa.String()))
    op.add_column("engines", sa.Column("merges", sa.String()))
