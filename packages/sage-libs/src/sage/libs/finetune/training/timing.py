"""Measure the duration of short calls."""

import time
from collections.abc import Callable

_REPEATS = 7
#: Number of rows in the matrix products whose duration is measured.
PROBE_ROWS = 512


def least_seconds(call: Callable[[], object]) -> float:
    """Call a function several times and return the shortest duration in seconds."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
