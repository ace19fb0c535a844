"""Backups: one file with the database, the settings, the run directories and the output folders."""
