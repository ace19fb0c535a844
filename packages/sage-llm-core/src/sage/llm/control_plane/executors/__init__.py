"""Executors: how engines of each kind are checked, run and observed."""
