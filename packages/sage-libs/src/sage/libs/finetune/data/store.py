"""Tokenized datasets on disk. Samples are read one by one, so the tokens of all samples are never in memory together.

tokens.bin   concatenated token ids of all sequences, as 32-bit integers; a token t that the loss ignores is stored as -1 - t
bounds.bin   64-bit integers: the index of the first token of each sequence; the last integer is the total number of tokens
facts.json   the fields of TokenizationStats
"""

import contextlib
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
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sage.common.errors import DatasetError
from sage.common.paths import get_user_paths, private_folder
from sage.libs.finetune.data.folders import Split, select_files
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.loading import dataset_hash
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded, Encoder

#: Version of the cached data, part of the cache key. Increment this number if samples are read or tokenized differently.
_VERSION = 2
_PROGRESS_SAMPLES = 20_000
_KEPT_SECONDS = 30 * 24 * 3600.0
#: If an incomplete folder was not changed for this number of seconds, the folder is removed.
#: The process that wrote to this folder has probably crashed.
_PARTIAL_SECONDS = 24 * 3600.0
_PARTIAL = ".partial-"
#: A function that is called regularly with a description of the progress. If the function raises an exception, reading ends.
OnProgress = Callable[[str], None]
Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenizationStats:
    """Counts and findings collected while a dataset was tokenized."""

    samples: int  #: number of samples read
    truncated: int
    dropped: int
    findings: list[dict[str, Any]]  #: as returned by `Findings.as_dicts`


class StoredSamples(Sequence[Encoded]):
    """The tokenized sequences in a folder, or a selection of them. The sequences stay readable after the folder is removed.

    The file `tokens.bin` is not memory-mapped, because mapped pages count as memory of the process.
    """

    def __init__(self, stats: TokenizationStats, bounds: Indexes, tokens: IO[bytes], indexes: Indexes | None = None) -> None:
        """bounds: content of bounds.bin.  tokens: the opened file tokens.bin.  indexes: selected sequences; None: all."""
        self.stats, self._bounds, self._tokens = stats, bounds, tokens
        self._indexes = np.arange(len(bounds) - 1) if indexes is None else indexes

    @classmethod
    def of_folder(cls, folder: Path) -> "StoredSamples":
        """Open the sequences in a folder; raises OSError, ValueError or TypeError if files are missing or damaged."""
        stats = TokenizationStats(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
        bounds = np.fromfile(folder / "bounds.bin", np.int64)
        tokens = (folder / "tokens.bin").open("rb", buffering=0)
        if not len(bounds) or os.fstat(tokens.fileno()).st_size != 4 * bounds[-1]:
            tokens.close()
            raise ValueError(f"{folder} is incomplete")
        return cls(stats, bounds, tokens)

    def __len__(self) -> int:
        return len(self._indexes)

    def __getitem__(self, at: Any) -> Any:
        index = self._indexes[at]
        begin, end = (int(bound) for bound in self._bounds[index : index + 2])
        written = np.frombuffer(os.pread(self._tokens.fileno(), 4 * (end - begin), 4 * begin), np.int32)
        trained = written >= 0
        return Encoded(np.where(trained, written, -1 - written).tolist(), np.where(trained, written, IGNORED).tolist())

    def take(self, indexes: Sequence[int]) -> "StoredSamples":
        """Return a selection: the sequences at `indexes`, in this order."""
        return StoredSamples(self.stats, self._bounds, self._tokens, self._indexes[np.asarray(indexes, np.int64)])

    def lengths(self) -> list[int]:
        """Return the number of tokens of each sequence."""
        return [int(length) for length in np.diff(self._bounds)[self._indexes]]


def load_or_tokenize(path: Path, encoder: Encoder, on_progress: OnProgress, split: Split = "train") -> StoredSamples:
    """Return the tokenized dataset from the cache; tokenize the dataset first if the cache does not contain the result.

    Raises DatasetError if the dataset has faults, has nothing to train on, or changes during reading.
    """
    root = get_user_paths().cache_dir / "tokenized"
    if skipped := select_files(path, split).skipped:
        on_progress(
            f"reading the {split} split of {path}; not read: {', '.join(str(file.relative_to(path)) for file in skipped)}"
        )
    before = _file_stats(path, split)
    folder = root / _key(path, encoder, split)
    found = _open_if_intact(folder)
    if found is None:
        private_folder(root)
        _remove_unused(root)
        aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
        try:
            _build(DatasetReport(path, split), encoder, aside, on_progress)
            if _file_stats(path, split) != before:
                raise DatasetError(
                    code="dataset_changed",
                    message=f"The dataset {path} changed while it was read.",
                    hint="Start the run again when no other program is writing to the dataset.",
                    param="dataset_path",
                )
            found = _publish(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process possibly has removed the folder; the open files stay readable
        os.utime(folder)
    return found


def _open_if_intact(folder: Path) -> StoredSamples | None:
    try:
        return StoredSamples.of_folder(folder)
    except (OSError, ValueError, TypeError):
        return None


def _build(report: DatasetReport, encoder: Encoder, folder: Path, on_progress: OnProgress) -> None:
    bounds = array("q", [0])
    with _synced(folder / "tokens.bin") as tokens:
        for encoded in encoder.encode(_valid_samples(report, on_progress)):
            ids, labels = np.array(encoded.ids, np.int32), np.array(encoded.labels, np.int32)
            tokens.write(np.where(labels == IGNORED, -1 - ids, ids).tobytes())
            bounds.append(bounds[-1] + len(ids))
    with _synced(folder / "bounds.bin") as file:
        file.write(bounds.tobytes())
    with _synced(folder / "facts.json") as file:
        stats = TokenizationStats(report.sample_count, encoder.truncated, encoder.dropped, encoder.findings.as_dicts())
        file.write(json.dumps(asdict(stats)).encode())


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _publish(aside: Path, folder: Path) -> StoredSamples:
    """Rename the folder `aside` to `folder`, unless an intact `folder` exists already; return the samples in `folder`."""
    samples = StoredSamples.of_folder(aside)
    try:
        aside.rename(folder)
    except OSError:  # `folder` exists already
        if other := _open_if_intact(folder):
            return other
        # Rename a damaged folder before removing it, so that readers find a complete folder or no folder.
        damaged = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        with contextlib.suppress(OSError):
            folder.rename(damaged)
            aside.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)
    return samples


def _valid_samples(report: DatasetReport, on_progress: OnProgress) -> Iterator[Sample]:
    """Yield the samples before the first fault. If there were faults, raise DatasetError after reading the whole dataset."""
    for sample in read_samples(report):
        if report.sample_count % _PROGRESS_SAMPLES == 0:
            on_progress(f"tokenizing {report.path}: {report.sample_count:,} samples")
        if not report.faults:
            yield sample
    report.raise_for_faults()


def _file_stats(path: Path, split: Split) -> list[tuple[str, int, int]]:
    stats = [(file, file.stat()) for file in select_files(path, split).files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def _key(path: Path, encoder: Encoder, split: Split) -> str:
    what = [_VERSION, version("transformers"), str(path), dataset_hash(path, split=split), encoder.settings()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _remove_unused(root: Path) -> None:
    for folder in root.iterdir():
        kept_seconds = _PARTIAL_SECONDS if folder.name.startswith(_PARTIAL) else _KEPT_SECONDS
        with contextlib.suppress(OSError):  # another process possibly removes or renames the folder at the same time
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - changed > kept_seconds:
                shutil.rmtree(folder, ignore_errors=True)
