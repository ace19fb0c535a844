import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SAMPLES, chat_record, write_jsonl

from sage.common.errors import DatasetError
from sage.libs.finetune.data.linting import DatasetReport, check_dataset, read_samples
from sage.libs.finetune.data.loading import dataset_hash


def test_our_own_samples_have_no_fault() -> None:
    report = check_dataset(SAMPLES)
    report.raise_for_faults()
    assert report.sample_count >= 80
    assert not report.duplicates


def test_line_17_of_broken_json_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(chat_record(f"q{i}", "a")) for i in range(20)]
    lines[16] = '{"messages": ['
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=r"train\.jsonl:17: not valid JSON") as caught:
        check_dataset(path).raise_for_faults()
    assert "dataset check" in caught.value.hint


def test_every_fault_is_reported_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\n{"text": "ok"}\n{"x": 1}\n\xff\n[]\n')
    assert [fault.origin.line for fault in check_dataset(path).faults] == [3, 4, 5]


def test_many_faults_are_counted_and_three_are_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"x": 1}] * 9)
    with pytest.raises(DatasetError, match=r"and 6 more"):
        check_dataset(path).raise_for_faults()


def test_duplicates_are_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    [(again, first)] = check_dataset(path).duplicates
    assert (again.line, first.line) == (3, 1)


def test_csv_json_and_parquet_say_the_same_as_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"q, with comma","a\nof two lines"\n')
    (tmp_path / "b.json").write_text(json.dumps([chat_record("q, with comma", "a\nof two lines")]))
    table = pa.table({"instruction": ["q, with comma"], "output": ["a\nof two lines"], "input": [None]})
    pq.write_table(table, tmp_path / "c.parquet")
    write_jsonl(tmp_path / "d.jsonl", [chat_record("q, with comma", "a\nof two lines")])
    (tmp_path / "readme.txt").write_text("is passed over")
    report = DatasetReport(tmp_path)
    samples = list(read_samples(report))
    assert not report.faults
    assert [sample.format for sample in samples] == ["prompt_completion", "openai", "alpaca", "openai"]
    assert len({repr(sample.content) for sample in samples}) == 1
    assert check_dataset(tmp_path, at_most=3).sample_count == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,completion\nq\n", ":2: 2 columns"),
        ("a.csv", b'prompt,completion\n"q', "not valid CSV"),
        ("a.json", b'{"a": 1}', "a list of records is expected"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "name the file .jsonl"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.parquet", b"PAR1", "not a whole parquet file"),
    ],
)
def test_a_broken_file_of_any_kind_is_a_fault_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    [fault] = check_dataset(tmp_path / name).faults
    assert said in str(fault)


@pytest.mark.parametrize(("name", "said"), [("no.jsonl", "does not exist"), ("x.txt", "is none of"), ("empty", "without")])
def test_what_is_no_dataset_is_refused_before_reading(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=said):
        check_dataset(tmp_path / name)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DatasetError, match="is empty"):
        check_dataset(path).raise_for_faults()


def test_the_hash_follows_the_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    before = dataset_hash(path)
    assert dataset_hash(path) == before
    write_jsonl(path, [{"text": "b"}])
    assert dataset_hash(path) != before


FIELDS = [
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "text",
    "prompt",
    "completion",
    "tools",
    "instruction",
    "output",
    "history",
    "tool_calls",
    "function",
    "weight",
]
LEAVES = st.none() | st.booleans() | st.floats() | st.text()


@settings(max_examples=200)
@given(st.recursive(LEAVES, lambda s: st.lists(s) | st.dictionaries(st.sampled_from(FIELDS), s), max_leaves=12))
def test_no_record_whatever_breaks_the_check(tmp_path_factory: pytest.TempPathFactory, record: object) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("fuzz") / "t.jsonl", [record])
    report = check_dataset(path)
    assert report.sample_count + len(report.faults) == 1
