"""Read and tokenize samples during training, without a cache on disk."""

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

#: Number of samples that are shuffled and packed together.
_MIXED_SAMPLES = 1000


class StreamedPacks(IterableDataset[Pack]):
    """Yields the packs of several datasets, dataset by dataset. After the last dataset, the first dataset is read again.

    Each iterator yields the same packs in the same order, so that a run can resume.
    """

    def __init__(
        self, paths: Sequence[Path], new_encoder: Callable[[], Encoder], pack_tokens: int | None, seed: int,
        report: Callable[[Findings, Path], None],
    ) -> None:  # fmt: skip
        """pack_tokens: maximum number of tokens of a pack; None: one sample per pack.

        report: function that is called with all findings so far and `paths[0]`. If the function raises an exception, the
        run ends.
        """
        self._paths, self._new_encoder, self._pack_tokens, self._seed = paths, new_encoder, pack_tokens, seed
        self._report = report

    def __iter__(self) -> Iterator[Pack]:
        seeds = random.Random(self._seed)  # noqa: S311 - reproducible, no secret
        while True:
            encoder = self._new_encoder()
            encoded = encoder.encode(sample for path in self._paths for sample in _sound(path))
            while chunk := list(itertools.islice(encoded, _MIXED_SAMPLES)):
                encoder.raise_for_faults()
                self._report(encoder.findings, self._paths[0])
                lengths = [len(sequence.ids) for sequence in chunk]
                for group in pack(lengths, self._pack_tokens or 1, seeds.getrandbits(32)):
                    yield tuple(chunk[index] for index in group)


def _sound(path: Path) -> Iterator[Sample]:
    report = DatasetReport(path)
    for sample in read_samples(report):
        if report.faults:
            break
        yield sample
    report.raise_for_faults()
