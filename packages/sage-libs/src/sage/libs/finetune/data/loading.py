"""Reading dataset files record by record, with the place of each."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sage.common.errors import DatasetError
from sage.libs.finetune.data.samples import Fault, Origin

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: A cell of a CSV may hold a whole conversation.
_CSV_FIELD_BYTES = 64 * 2**20


def dataset_files(path: Path) -> list[Path]:
    """Return the files of a dataset: itself, or those of a folder, sorted by name.

    Raises DatasetError where there is none of a known kind.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise _unusable(path, f"is a folder without {', '.join(SUFFIXES)} files")
        return files
    if not path.exists():
        raise _unusable(path, "does not exist")
    if path.suffix not in SUFFIXES:
        raise _unusable(path, f"is none of {', '.join(SUFFIXES)}")
    return [path]


def dataset_hash(*paths: Path) -> str:
    """Return the SHA-256 of the bytes of datasets, file by file, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in (file for path in paths for file in dataset_files(path)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_records(path: Path) -> Iterator[tuple[Origin, Any] | Fault]:
    """Yield each record of a dataset with its place, or the fault found there.

    Raises DatasetError where a file cannot be read at all.
    """
    for file in dataset_files(path):
        try:
            yield from _READERS[file.suffix](file)
        except OSError as error:
            raise _unusable(file, f"cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[Origin, Any] | Fault]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = Origin(path, number)
            if not line.strip():
                continue
            try:
                yield origin, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Fault(origin, f"not UTF-8 at byte {error.start + 1}.", "Save the file as UTF-8.")
            except json.JSONDecodeError as error:
                yield Fault(origin, f"not valid JSON: {error.msg} at column {error.colno}.", "Mend or remove the line.")


def _read_json(path: Path) -> Iterator[tuple[Origin, Any] | Fault]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Fault(Origin(path, 1), f"not UTF-8 at byte {error.start + 1}.", "Save the file as UTF-8.")
        return
    except json.JSONDecodeError as error:
        hint = "One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        yield Fault(Origin(path, error.lineno), f"not valid JSON: {error.msg} at column {error.colno}.", hint)
        return
    if not isinstance(records, list):
        yield Fault(Origin(path, 1), "a list of records is expected.")
        return
    for number, record in enumerate(records, 1):
        yield Origin(path, number), record


def _read_csv(path: Path) -> Iterator[tuple[Origin, Any] | Fault]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                origin = Origin(path, rows.line_num)
                if None in row or None in row.values():
                    yield Fault(origin, f"{len(rows.fieldnames or ())} columns are expected.", "Quote cells with commas.")
                else:
                    yield origin, {key: value for key, value in row.items() if value != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            yield Fault(Origin(path, rows.line_num + 1), f"not valid CSV: {error}.", "Save it as UTF-8 CSV.")


def _read_parquet(path: Path) -> Iterator[tuple[Origin, Any] | Fault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Origin(path, number), record
    except pa.ArrowException as error:
        yield Fault(Origin(path, number + 1), f"not a whole parquet file: {error}.", "Write it again.")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _unusable(path: Path, problem: str) -> DatasetError:
    return DatasetError(
        code="dataset_unusable",
        message=f"The dataset {path} {problem}.",
        hint="Give a .jsonl, .json, .csv or .parquet file, or a folder of them.",
        param="dataset_path",
    )
