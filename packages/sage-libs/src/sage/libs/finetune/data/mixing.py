"""Combine tokenized datasets by their weights."""

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import Any

from sage.libs.finetune.data.store import StoredSamples
from sage.libs.finetune.data.tokenizing import Encoded


class Mixture(Sequence[Encoded]):
    """A sequence that concatenates several datasets."""

    def __init__(self, parts: Sequence[StoredSamples]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, at: Any) -> Any:
        part = bisect.bisect_right(self._ends, at)
        return self._parts[part][at - (self._ends[part - 1] if part else 0)]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each sample."""
        return [length for part in self._parts for length in part.lengths()]


def repeated_by_weight(samples: StoredSamples, weight: float, seed: int) -> StoredSamples:
    """Repeat the samples `weight` times. For weight 2.5, each sample is used twice, and half of the samples a third time.

    seed: determines which samples are used once more than the other samples.
    """
    if weight == 1:
        return samples
    count, times = len(samples), int(weight)
    rest = random.Random(seed).sample(range(count), round((weight - times) * count))  # noqa: S311 - reproducible, no secret
    return samples.take([*range(count)] * times + sorted(rest))
