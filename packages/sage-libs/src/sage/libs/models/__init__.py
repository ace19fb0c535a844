"""Find models by their names, and load them from local folders."""
