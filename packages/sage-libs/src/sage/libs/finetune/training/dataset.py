"""Third phase of a run: read, split, mix and pack the data."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage.common.counting import counted
from sage.common.errors import DatasetError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.findings import Findings
from sage.libs.finetune.data.folders import Split
from sage.libs.finetune.data.mixing import Mixture, repeated_by_weight
from sage.libs.finetune.data.store import StoredSamples, load_or_tokenize
from sage.libs.finetune.data.tokenizing import Encoded, Encoder
from sage.libs.finetune.run.estimate import batch_limit
from sage.libs.finetune.training.batching import Packs, largest_packs, pack
from sage.libs.finetune.training.reporting import Reporter
from sage.libs.finetune.training.stopping import StopRequested
from sage.libs.finetune.training.streaming import StreamedPacks


@dataclass(frozen=True)
class TrainingData:
    """The training data and the held-out data of a run."""

    packs: Packs | StreamedPacks | Sequence[Any]  #: a sequence of rows if TRL is used
    samples: int | None  #: number of training samples; None for streaming
    heldout: Sequence[Encoded]
    micro_batch: int  #: number of packs per micro-batch
    #: Sample lengths in the largest micro-batch. Keys: lengths in tokens. Values: number of samples that have this length.
    largest_batch: Mapping[int, int]
    #: Indexes of the packs in the largest micro-batch; empty if these packs are not known.
    largest_packs: Sequence[int] = ()


def load_data(config: FinetuneConfig, new_encoder: Callable[[], Encoder], report: Reporter) -> TrainingData:
    """Load the data of a run. If a stop of the run is requested during loading, return data without packs.

    new_encoder: returns a new encoder for each dataset.  Raises DatasetError if the data is invalid.
    """
    micro_batch = 1 if config.pack_tokens else config.batch_size
    limit = batch_limit(config)
    reader = _Reader(new_encoder, report, config.max_seq_length)
    heldout: Sequence[Encoded] = []
    try:
        if config.streaming:
            heldout = reader.read(Path(config.eval_path), "validation") if config.eval_path else []
            paths = [source.path for source in config.sources]
            streamed = StreamedPacks(paths, new_encoder, config.pack_tokens, config.seed, report.findings)
            return TrainingData(streamed, None, heldout, micro_batch, limit)
        train, heldout = _split(config, reader)
        lengths = train.lengths()
        groups = pack(lengths, config.pack_tokens, config.seed) if config.pack_tokens else None
        largest = largest_packs(lengths, groups, micro_batch)
        samples = (index for at in largest for index in ([at] if groups is None else groups[at]))
        in_largest = Counter(lengths[index] for index in samples)
        return TrainingData(Packs(train, groups), len(train), heldout, micro_batch, in_largest, largest)
    except StopRequested:  # without packs, nothing is trained, and the result is the unchanged model
        return TrainingData(Packs([]), 0, heldout, micro_batch, limit)


def _split(config: FinetuneConfig, reader: "_Reader") -> tuple[Mixture, Sequence[Encoded]]:
    parts, heldout = [], []
    for source in config.sources:
        samples = reader.read(source.path)
        order = list(range(len(samples)))
        random.Random(config.seed).shuffle(order)  # noqa: S311 - reproducible, no secret
        count = round(len(samples) * config.eval_split)
        heldout.append(samples.take(sorted(order[:count])))
        parts.append(repeated_by_weight(samples.take(sorted(order[count:])), source.weight, config.seed))
    train = Mixture(parts)
    if not len(train):
        raise DatasetError(
            code="dataset_empty",
            message="The dataset weights are so small that no sample is selected.",
            hint="Increase the weight of at least one dataset.",
            param="dataset_path",
        )
    return train, reader.read(Path(config.eval_path), "validation") if config.eval_path else Mixture(heldout)


@dataclass(frozen=True)
class _Reader:
    new_encoder: Callable[[], Encoder]
    report: Reporter
    max_seq_length: int

    def read(self, path: Path, split: Split = "train") -> StoredSamples:
        self.report.progress(f"reading {path}")
        samples = load_or_tokenize(path, self.new_encoder(), self.report.progress_unless_stopped, split)
        if samples.stats.truncated:
            self.report.warn(
                f"{path} ({counted(samples.stats.samples, 'sample')}): truncated "
                f"{counted(samples.stats.truncated, 'sequence')} to {self.max_seq_length} tokens, and dropped "
                f"{counted(samples.stats.dropped, 'sequence')} whose answer is entirely beyond this limit."
            )
        self.report.findings(Findings(samples.stats.findings), path)
        return samples
