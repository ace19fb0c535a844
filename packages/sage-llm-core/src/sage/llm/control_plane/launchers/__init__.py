"""Launchers: how processes are started, observed and signalled."""
