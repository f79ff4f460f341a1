"""Run by Alembic, which brings a store to the newest tables; `store.VoteStore` hands over the connection."""

from alembic import context

from musicrl_hf.collect.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
