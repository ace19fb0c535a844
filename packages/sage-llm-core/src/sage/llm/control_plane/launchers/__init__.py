"""Launchers: start, observe and signal processes."""
