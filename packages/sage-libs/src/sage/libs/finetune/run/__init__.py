"""A run on the disk: what it shall do, what happened, and what it saved. Nothing here imports torch."""
