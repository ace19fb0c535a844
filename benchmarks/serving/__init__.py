"""Measure tokens/s, time to the first token, memory and start time of the backends: `python -m serving` in `benchmarks`."""
