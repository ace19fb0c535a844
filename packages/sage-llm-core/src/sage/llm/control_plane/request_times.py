"""Count the requests to each engine by their duration."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily

#: Upper bounds of the histogram's buckets.
_BOUNDS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BUCKETS = [*map(str, _BOUNDS_SECONDS), "+Inf"]


class RequestTimes:
    """The durations of this gateway's requests, as one histogram per engine."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums_seconds: dict[str, float] = {}

    def add(self, engine_id: str, seconds: float) -> None:
        """Count a request. Every inference request calls this method, so the method must be fast."""
        counts = self._counts.get(engine_id)
        if counts is None:
            counts = self._counts[engine_id] = [0] * len(_BUCKETS)
            self._sums_seconds[engine_id] = 0.0
        counts[bisect_left(_BOUNDS_SECONDS, seconds)] += 1
        self._sums_seconds[engine_id] += seconds

    def forget_all_but(self, engine_ids: Collection[str]) -> None:
        """Remove the histograms of all engines that are not in `engine_ids`."""
        for engine_id in self._counts.keys() - engine_ids:
            del self._counts[engine_id], self._sums_seconds[engine_id]

    def add_to(self, family: HistogramMetricFamily, engine_id: str, labels: Sequence[str]) -> None:
        """Add the histogram of an engine to a metric; an engine without requests has an empty histogram."""
        counts = self._counts.get(engine_id, [0] * len(_BUCKETS))
        buckets = [(bound, float(count)) for bound, count in zip(_BUCKETS, accumulate(counts), strict=True)]
        family.add_metric(labels, buckets, self._sums_seconds.get(engine_id, 0.0))
