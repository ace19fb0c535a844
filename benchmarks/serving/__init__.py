"""Tokens per second, time to the first token, memory and start-up of the backends: `python -m serving` in `benchmarks`."""
