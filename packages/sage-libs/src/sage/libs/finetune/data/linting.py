"""Read a dataset and report all its faults with their positions."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sage.common.errors import DatasetError
from sage.libs.finetune.data.folders import Split, select_files
from sage.libs.finetune.data.formats import Parsed, parse_record
from sage.libs.finetune.data.loading import read_records
from sage.libs.finetune.data.samples import Chat, Fault, Origin, Sample
from sage.libs.finetune.data.values import RecordError

#: A function that parses a record, and raises RecordError if the record is invalid.
Parse = Callable[[Any], Parsed]
_SHOWN_FAULTS = 3


@dataclass
class DatasetReport:
    """Contents and faults of a dataset."""

    path: Path
    split: Split = "train"  #: split to read if `path` is a folder
    files: list[Path] = field(default_factory=list)  #: the files that are read
    skipped_files: list[Path] = field(default_factory=list)  #: data files of other splits
    sample_count: int = 0
    faults: list[Fault] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    assistant_turns: int = 0
    #: For each repeated record: its position, and the position of the first record with the same content.
    duplicates: list[tuple[Origin, Origin]] = field(default_factory=list)

    def raise_for_faults(self) -> None:
        """Raise DatasetError if the dataset has faults or no records."""
        if self.faults:
            shown = " ".join(str(fault) for fault in self.faults[:_SHOWN_FAULTS])
            more = f" (and {len(self.faults) - _SHOWN_FAULTS} more)" if len(self.faults) > _SHOWN_FAULTS else ""
            raise DatasetError(
                code="dataset_invalid",
                message=f"{shown}{more}",
                hint=f"`sage llm dataset check {self.path}` lists every fault.",
                param="dataset_path",
            )
        if not self.sample_count:
            raise DatasetError(
                code="dataset_empty",
                message=f"The dataset {self.path} is empty.",
                hint='Each line is one JSON object, such as {"messages": [...]}.',
                param="dataset_path",
            )


def read_samples(report: DatasetReport, parse: Parse = parse_record) -> Iterator[Sample]:
    """Yield the samples of the dataset `report.path`, and add counts and faults to the report.

    Raises DatasetError if no file is found or a file cannot be read.
    """
    selection = select_files(report.path, report.split)
    report.files, report.skipped_files = selection.files, selection.skipped
    for item in read_records(selection.files):
        if isinstance(item, Fault):
            report.faults.append(item)
            continue
        origin, record = item
        try:
            name, content, ignored = parse(record)
        except RecordError as error:
            report.faults.append(Fault(origin, error.message, error.hint))
            continue
        except RecursionError:
            report.faults.append(Fault(origin, "the record is nested too deeply.", "Fix or remove the record."))
            continue
        report.sample_count += 1
        report.formats[name] += 1
        if isinstance(content, Chat):
            report.assistant_turns += sum(message["role"] == "assistant" for message in content.messages)
        yield Sample(origin, name, content, ignored)


def check_dataset(
    path: Path, at_most: int | None = None, parse: Parse = parse_record, split: Split = "train"
) -> DatasetReport:
    """Read the first `at_most` samples of a dataset (None: all samples), and return a report.

    Raises DatasetError if no file is found or a file cannot be read.
    """
    report = DatasetReport(path, split)
    seen: dict[bytes, Origin] = {}
    for sample in itertools.islice(read_samples(report, parse), at_most):
        digest = blake2b(repr(sample.content).encode(), digest_size=16).digest()
        first = seen.setdefault(digest, sample.origin)
        if first is not sample.origin:
            report.duplicates.append((sample.origin, first))
    return report
