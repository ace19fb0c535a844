"""Find models by name, and load models from local folders."""
