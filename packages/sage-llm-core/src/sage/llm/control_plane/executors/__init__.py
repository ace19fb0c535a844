"""Executors: check, run and observe the engines of each kind."""
