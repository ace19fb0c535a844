"""Backends: the programs that run engines."""
