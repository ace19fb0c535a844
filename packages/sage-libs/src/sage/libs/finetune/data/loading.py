"""Read dataset files record by record, with the position of each record."""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sage.common.errors import first_line
from sage.libs.finetune.data.folders import Split, select_files, suffix_of, unusable
from sage.libs.finetune.data.samples import Fault, Origin
from sage.libs.finetune.data.values import DECODER, json_problem, without_nulls

#: Maximum length of a CSV cell, in characters.
_CSV_FIELD_CHARACTERS = 64 * 2**20
#: Maximum length of a .jsonl line, in bytes.
_LINE_BYTES = 64 * 2**20
_BATCH_ROWS = 1024
_BLANK = re.compile(r"[ \t\n\r]*")
_SEPARATORS = ((";", "semicolons"), ("\t", "tabs"))
_AS_UTF8 = "Save the file as UTF-8."
_ONE_A_LINE = "Write each record on one line. If the file contains one list, change the suffix of the file to .json."
_LFS_POINTER = b"version https://git-lfs"

#: A record with its position, or a fault.
Item = tuple[Origin, Any] | Fault


def dataset_hash(*paths: Path, split: Split = "train") -> str:
    """Return a hash of the contents of the datasets, as 64 hex digits. In a folder, only the files of `split` are read."""
    digest = hashlib.sha256()
    for file in (file for path in paths for file in select_files(path, split).files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_records(files: Sequence[Path]) -> Iterator[Item]:
    """Yield each record with its position, or a fault.

    Raises DatasetError if a file cannot be read at all.
    """
    for file in files:
        try:
            yield from _read(file)
        except (OSError, EOFError, zlib.error) as error:
            raise unusable(file, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        begin = file.read(len(_LFS_POINTER))
    if begin == _LFS_POINTER:
        raise unusable(path, "is a Git LFS pointer, not the data", "Run `git lfs pull` in the dataset's repository.")
    match suffix_of(path).split(".")[1]:
        case "parquet":
            return _read_columns(path, _parquet_batches)
        case "arrow":
            return _read_columns(path, _arrow_batches)
        case "csv":
            return _read_text(path, _read_csv)
        case "json":
            return _read_text(path, _read_json)
        case _:
            return _read_text(path, _read_jsonl)


def _open(path: Path) -> io.BufferedReader:
    raw: Any
    match suffix_of(path).rpartition(".")[2]:
        case "gz":
            raw = gzip.GzipFile(path)
        case "zst":
            import pyarrow as pa

            raw = pa.input_stream(str(path), compression="zstd")
        case _:
            return path.open("rb")
    return io.BufferedReader(raw)


def _read_text(path: Path, read: Callable[[Path, io.BufferedReader], Iterator[Item]]) -> Iterator[Item]:
    with _open(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield Fault(Origin(path, 1), "the file is in UTF-16.", _AS_UTF8)
        else:
            yield from read(path, file)


def _read_jsonl(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    lines = iter(partial(file.readline, _LINE_BYTES), b"")
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    for index, (number, line) in enumerate(filled):
        origin = Origin(path, number)
        if len(line) == _LINE_BYTES:
            yield Fault(origin, f"the line is longer than {_LINE_BYTES // 2**20} MiB.", _ONE_A_LINE)
            return
        try:
            record = DECODER.decode(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield Fault(origin, f"not UTF-8 at byte {error.start + 1}.", _AS_UTF8)
        except (ValueError, RecursionError) as error:
            if index == 0 and isinstance(error, json.JSONDecodeError) and _is_multiline(line):
                yield Fault(origin, "the first record spans several lines.", _ONE_A_LINE)
                return
            yield Fault(origin, f"not valid JSON: {json_problem(error)}.", "Fix or remove the line.")
        else:
            yield origin, record


def _is_multiline(line: bytes) -> bool:
    """Return whether an invalid JSON line seems to be the first line of a value that is written over several lines."""
    return line.rstrip()[-1:] in b"[{" or line.lstrip()[:1] == b"["


def _read_json(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        byte = error.start - error.object.rfind(b"\n", 0, error.start)
        yield Fault(Origin(path, number), f"not UTF-8 at byte {byte}.", _AS_UTF8)
        return
    at = _behind_blanks(text, 0)
    if text[at : at + 1] != "[":
        yield Fault(
            Origin(path, 1),
            "a list of records is expected.",
            "If the file has one object per line, change the suffix of the file to .jsonl.",
        )
        return
    yield from _read_list(path, text, at + 1)


def _read_list(path: Path, text: str, at: int) -> Iterator[Item]:
    """at: index of the character after the opening bracket."""
    at = _behind_blanks(text, at)
    is_end = text[at : at + 1] == "]"
    for number in itertools.count(1):
        if is_end:
            break
        origin = Origin(path, number, "record")
        try:
            record, at = DECODER.raw_decode(text, at)
            at = _behind_blanks(text, at)
            is_end = text[at : at + 1] == "]"
            if not is_end and text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except json.JSONDecodeError as error:
            yield Fault(Origin(path, error.lineno), f"not valid JSON: {json_problem(error)}.")
            return
        except (ValueError, RecursionError) as error:
            yield Fault(origin, f"not valid JSON: {json_problem(error)}.", "Fix or remove the record.")
            return
        yield origin, record
        if not is_end:
            at = _behind_blanks(text, at + 1)
    if text[at + 1 :].strip():
        yield Fault(Origin(path, text.count("\n", 0, at) + 1), "not valid JSON: there is text after the list.")


def _behind_blanks(text: str, at: int) -> int:
    blanks = _BLANK.match(text, at)
    return blanks.end() if blanks else at


def _read_csv(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    csv.field_size_limit(_CSV_FIELD_CHARACTERS)
    broken: list[int] = []
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(_record_broken(text, broken), strict=True)
    header: list[str] | None = None
    while True:
        origin = Origin(path, rows.line_num + 1)
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Fault(
                origin,
                f"not valid CSV: {error}.",
                'End each quoted cell with a quote, and write "" for a quote inside a cell.',
            )
            return
        if row is None:
            return
        if broken:
            yield Fault(Origin(path, broken[0]), "not UTF-8.", _AS_UTF8)
            broken.clear()
        elif row and header is None:
            header = row
            if problem := _header_problem(row):
                yield Fault(origin, *problem)
                return
        elif row and header is not None:
            if len(row) == len(header):
                yield origin, {name: cell for name, cell in zip(header, row, strict=True) if cell != ""}
            else:
                yield Fault(
                    origin,
                    f"{len(header)} columns are expected, found {len(row)}.",
                    "Put quotes around cells that contain commas.",
                )


def _record_broken(lines: Iterable[str], broken: list[int]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.isascii() and any("\udc80" <= letter <= "\udcff" for letter in line):
            broken.append(number)
        yield line


def _header_problem(header: list[str]) -> tuple[str, str] | None:
    if len(header) == 1 and (found := next((name for sign, name in _SEPARATORS if sign in header[0]), None)):
        return f"the columns are separated by {found}.", "Save the file with commas between the columns."
    if len(set(header)) < len(header):
        return "two columns have the same name.", "Rename or remove one of them."
    return None


def _read_columns(path: Path, batches: Callable[[Path], Iterator[Any]]) -> Iterator[Item]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches(path):
            is_nested = any(pa.types.is_nested(column.type) for column in batch.schema)
            for record in batch.to_pylist():
                number += 1
                # All rows of a struct column have the same keys; if a row has no value for a key, the value is null.
                yield Origin(path, number, "record"), without_nulls(record) if is_nested else record
    except (pa.ArrowException, ValueError) as error:
        problem = first_line(error)
        origin = Origin(path, number + 1, "record")
        yield Fault(
            origin,
            f"the {path.suffix[1:].lower()} file is damaged after this position: {problem}.",
            "Create the file again.",
        )


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:
        try:
            batches: Iterable[Any] = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # the content is not in Arrow's stream format, so Arrow's file format is tried
            source.seek(0)
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in batches:
            yield from (batch.slice(begin, _BATCH_ROWS) for begin in range(0, batch.num_rows, _BATCH_ROWS))
