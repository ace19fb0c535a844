"""Tokenised datasets on disk: made once, read sample by sample, so that memory stays flat however many there are.

tokens.bin   token ids, one sample behind the other, as 32-bit integers; where the loss is not, t is written as -1 - t
bounds.bin   where each sample begins and where the last one ends, in tokens, as 64-bit integers
facts.json   what the cutoff did
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage.common.paths import get_user_paths
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.loading import dataset_hash
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded, Encoder

#: Raised whenever the same samples would be tokenised otherwise.
_VERSION = 2
_TOLD_SAMPLES = 20_000
_KEPT_SECONDS = 30 * 24 * 3600.0
#: Called now and then with what is being done; what it raises ends the work.
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Facts:
    """What the cutoff did to a dataset."""

    samples: int  #: before the cut
    truncated: int
    dropped: int
    findings: list[dict[str, Any]]  #: as `Findings.as_dicts` returns them


class StoredSamples(Sequence[Encoded]):
    """The sequences of a folder, or some of them.

    They are read and not mapped into memory: what is mapped counts as the process's own once it was looked at.
    """

    def __init__(self, folder: Path, indexes: npt.NDArray[np.int64] | None = None) -> None:
        """Raises ValueError where the folder is not whole."""
        self._folder = folder
        self.facts = Facts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
        self._bounds = np.fromfile(folder / "bounds.bin", np.int64)
        if not len(self._bounds) or (folder / "tokens.bin").stat().st_size != 4 * self._bounds[-1]:
            raise ValueError(f"{folder} is not whole")
        self._indexes = np.arange(len(self._bounds) - 1) if indexes is None else indexes
        self._tokens = (folder / "tokens.bin").open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._indexes)

    def __getitem__(self, at: Any) -> Any:
        """Return one sequence; no slices."""
        index = self._indexes[at]
        begin, end = (int(bound) for bound in self._bounds[index : index + 2])
        written = np.frombuffer(os.pread(self._tokens.fileno(), 4 * (end - begin), 4 * begin), np.int32)
        trained = written >= 0
        return Encoded(np.where(trained, written, -1 - written).tolist(), np.where(trained, written, IGNORED).tolist())

    def take(self, indexes: Sequence[int]) -> "StoredSamples":
        """Return some of the sequences, in the order given."""
        return StoredSamples(self._folder, self._indexes[np.asarray(indexes, np.int64)])

    def lengths(self) -> list[int]:
        """Return how many tokens each sequence has."""
        return [int(length) for length in np.diff(self._bounds)[self._indexes]]


def stored(path: Path, encoder: Encoder, on_progress: OnProgress) -> StoredSamples:
    """Return the sequences of a dataset, tokenised now or, from the same content in the same way, before.

    Raises DatasetError where the dataset has faults or leaves nothing to train on.
    """
    root = get_user_paths().cache_dir / "tokenized"
    folder = root / _key(path, encoder)
    try:
        found = StoredSamples(folder)
    except (OSError, ValueError, TypeError):
        root.mkdir(parents=True, exist_ok=True)
        _remove_unused(root)
        _build(path, encoder, folder, on_progress)
        found = StoredSamples(folder)
    os.utime(folder)
    return found


def _build(path: Path, encoder: Encoder, folder: Path, on_progress: OnProgress) -> None:
    """Write a folder, whole or not at all."""
    aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        report = DatasetReport(path)
        bounds = array("q", [0])
        with (aside / "tokens.bin").open("wb") as tokens:
            for encoded in encoder.encode(_sound_samples(report, on_progress)):
                ids, labels = np.array(encoded.ids, np.int32), np.array(encoded.labels, np.int32)
                tokens.write(np.where(labels == IGNORED, -1 - ids, ids).tobytes())
                bounds.append(bounds[-1] + len(ids))
        (aside / "bounds.bin").write_bytes(bounds.tobytes())
        facts = Facts(report.sample_count, encoder.truncated, encoder.dropped, encoder.findings.as_dicts())
        (aside / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sound_samples(report: DatasetReport, on_progress: OnProgress) -> Iterator[Sample]:
    """Yield samples as long as there is no fault; at the end, raise DatasetError for the faults there were."""
    for sample in read_samples(report):
        if report.sample_count % _TOLD_SAMPLES == 0:
            on_progress(f"tokenising {report.path}: {report.sample_count:,} samples")
        if not report.faults:
            yield sample
    report.raise_for_faults()


def _key(path: Path, encoder: Encoder) -> str:
    """Return the name of what a dataset is tokenised to: of its content, the tokenizer and the settings."""
    what = [_VERSION, version("transformers"), dataset_hash(path), *encoder.settings()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _remove_unused(root: Path) -> None:
    """Remove what nobody has used for a month, and what was left half made."""
    for folder in root.iterdir():
        if time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
