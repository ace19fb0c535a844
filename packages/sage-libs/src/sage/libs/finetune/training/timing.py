"""Measure the time of short calls."""

import time
from collections.abc import Callable

_REPEATS = 7
#: Number of rows of the matrix products that are timed.
PROBE_ROWS = 512


def least_seconds(call: Callable[[], object]) -> float:
    """Return the shortest time of several calls."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
