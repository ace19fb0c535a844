"""Samples read and tokenised as they are needed: a run begins at once, and nothing is kept on the disk."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import IterableDataset

from sage.libs.finetune.data.findings import Findings
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.data.tokenizing import Encoder
from sage.libs.finetune.training.batching import Pack, pack

#: Samples are mixed, and packed, among so many that follow each other.
_MIXED_SAMPLES = 1000


class StreamedPacks(IterableDataset[Pack]):
    """Datasets one behind the other, over and over; a second pass over it yields the same, which is how a run resumes."""

    def __init__(
        self, paths: Sequence[Path], new_encoder: Callable[[], Encoder], pack_tokens: int | None, seed: int,
        report: Callable[[Findings, Path], None],
    ) -> None:  # fmt: skip
        """pack_tokens: how many tokens a pack has at most; None: each sample is a pack of its own.

        report: called with what was found so far; what it raises ends the run.
        """
        self._paths, self._new_encoder, self._pack_tokens, self._seed = paths, new_encoder, pack_tokens, seed
        self._report = report

    def __iter__(self) -> Iterator[Pack]:
        """Yield packs without end; raises DatasetError at the first fault."""
        seeds = random.Random(self._seed)  # noqa: S311 - a reproducible order, not a secret
        while True:
            encoder = self._new_encoder()
            encoded = encoder.encode(sample for path in self._paths for sample in _sound(path))
            while chunk := list(itertools.islice(encoded, _MIXED_SAMPLES)):
                encoder.raise_for_faults()
                self._report(encoder.findings, self._paths[0])
                lengths = [len(sequence.ids) for sequence in chunk]
                # Of one token a pack takes nothing besides its first.
                for group in pack(lengths, self._pack_tokens or 1, seeds.getrandbits(32)):
                    yield tuple(chunk[index] for index in group)


def _sound(path: Path) -> Iterator[Sample]:
    report = DatasetReport(path)
    for sample in read_samples(report):
        if report.faults:
            break
        yield sample
    report.raise_for_faults()
