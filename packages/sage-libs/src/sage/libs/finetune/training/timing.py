"""How long a short call takes here."""

import time
from collections.abc import Callable

_REPEATS = 7
#: Rows of a matrix product that is timed.
PROBE_ROWS = 512


def least_seconds(call: Callable[[], object]) -> float:
    """Return the least time of some calls."""
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
