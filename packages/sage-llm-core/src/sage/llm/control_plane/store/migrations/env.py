"""Alembic's entry point: runs the migrations on the connection that `open_database` passes."""

from alembic import context

from sage.llm.control_plane.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
