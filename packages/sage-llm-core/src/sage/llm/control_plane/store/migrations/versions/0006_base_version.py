"""Add the version of a base model's files, so that an engine does not join a server that has loaded older files.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("engines", sa.Column("base_version", sa.String()))
    op.add_column("servers", sa.Column("model_version", sa.String()))
