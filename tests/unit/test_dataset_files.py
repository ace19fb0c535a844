import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SAMPLES, chat_record, write_jsonl

from sage.common.errors import DatasetError
from sage.libs.finetune.data import loading
from sage.libs.finetune.data.linting import DatasetReport, check_dataset, read_samples
from sage.libs.finetune.data.loading import dataset_hash
from sage.libs.finetune.data.preferences import Method, parser_of


def test_the_example_datasets_have_no_faults() -> None:
    report = check_dataset(SAMPLES)
    report.raise_for_faults()
    assert report.sample_count >= 80
    assert not report.duplicates


def test_the_error_for_invalid_json_names_the_line(tmp_path: Path) -> None:
    lines = [json.dumps(chat_record(f"q{i}", "a")) for i in range(20)]
    lines[16] = '{"messages": ['
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=r"train\.jsonl:17: not valid JSON") as caught:
        check_dataset(path).raise_for_faults()
    assert "dataset check" in caught.value.hint


def test_every_fault_is_reported_and_blank_lines_are_not_faults(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\n{"text": "ok"}\n{"x": 1}\n\xff\n[]\n')
    assert [fault.origin.line for fault in check_dataset(path).faults] == [3, 4, 5]


def test_the_message_counts_all_faults_and_lists_three(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"x": 1}] * 9)
    with pytest.raises(DatasetError, match=r"and 6 more"):
        check_dataset(path).raise_for_faults()


def test_duplicates_are_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    [(again, first)] = check_dataset(path).duplicates
    assert (again.line, first.line) == (3, 1)


def test_csv_json_and_parquet_give_the_same_samples_as_jsonl(tmp_path: Path) -> None:
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
        ("a.csv", b'prompt,completion\n"q', ":2: not valid CSV"),
        ("a.csv", b'prompt,completion\n"a\nb","c\nd"\n\n"q"x,y', ":6: not valid CSV"),
        ("a.csv", b"text\n" + b"a\n" * 300 + b"\xe9\n" + b"a\n" * 300, ":302: not UTF-8"),
        ("a.csv", b"prompt;completion\nq;a\nr;b\n", ":1: the columns are separated by semicolons"),
        ("a.csv", b"text,text\na,b\nc,d\n", ":1: two columns have the same name"),
        ("a.csv", "text\nä\n".encode("utf-16"), ":1: the file is in UTF-16"),
        ("a.json", b'{"a": 1}', "a list of records is expected"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "suffix of the file to .jsonl"),
        ("a.json", b"\n\na\xff", ":3: not UTF-8 at byte 2"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', ":2: not valid JSON: Expecting value at column 10"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', ":2: not valid JSON: Expecting ',' delimiter at column 1"),
        ("a.json", b'[{"text": "a"}]\n[]', ":1: not valid JSON: there is text after the list"),
        ("a.json", b'[{"text": "a"}', "not valid JSON"),
        ("a.json", b'[{"text": "a"}, {"text": NaN}]', ", record 2: not valid JSON: NaN is not a JSON value"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', ", record 2: text must be text, found a number"),
        ("a.json", b'[{"text": ' + b"[" * 100_000, ", record 1: not valid JSON: the value is nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": Infinity}\n', ":2: not valid JSON: Infinity is not a JSON value"),
        ("a.jsonl", b'\n{"text": "\\ud83d"}\n', ":2: text has an incomplete character (lone surrogate \\ud83d)"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, ":1: not valid JSON: the value is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ":1: not valid JSON: Exceeds the limit"),
        ("a.jsonl", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ":1: the first record spans several lines"),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]\n', "suffix of the file to .json."),
        ("a.parquet", b"PAR1", "record 1: the parquet file is damaged"),
        ("a.arrow", b"ARROW1", "record 1: the arrow file is damaged"),
    ],
)
def test_the_fault_of_a_broken_file_is_reported_with_its_position(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    [fault] = check_dataset(tmp_path / name).faults
    assert said in str(fault)


def test_the_rows_after_an_invalid_csv_row_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'text\n"two\nlines"\n\xff\n\nlast\n')
    report = DatasetReport(tmp_path / "t.csv")
    assert [(sample.origin.line, sample.content) for sample in read_samples(report)] == [(2, "two\nlines"), (6, "last")]
    assert [fault.origin.line for fault in report.faults] == [4]


def test_a_line_that_is_too_long_is_not_read_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LINE_BYTES", 2**20)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 2**20)
    report = check_dataset(tmp_path / "t.jsonl")
    assert (report.sample_count, [fault.message for fault in report.faults]) == (1, ["the line is longer than 1 MiB."])


def test_records_before_a_fault_in_a_list_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(' [ {"text": "a"} , {"text": "b"} , ]')
    report = check_dataset(tmp_path / "t.json")
    assert (report.sample_count, len(report.faults)) == (2, 1)
    for empty in ("[]", " [ ] \n"):
        (tmp_path / "t.json").write_text(empty)
        assert not check_dataset(tmp_path / "t.json").faults


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst", "T.JSONL.GZ", "t.json.gz", "t.csv.zst"])
def test_compressed_files_are_read_and_a_truncated_one_is_rejected(tmp_path: Path, name: str) -> None:
    kind = {".jsonl": '{"text": "ä"}\n' * 3, ".json": '[{"text": "ä"}]', ".csv": "text\nä\n"}
    content = kind[Path(name.lower()).with_suffix("").suffix].encode()
    path = tmp_path / name
    with pa.output_stream(str(path), compression="zstd" if name.endswith("zst") else "gzip") as file:
        file.write(content)
    assert {sample.content for sample in read_samples(DatasetReport(path))} == {"ä"}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match="cannot be read"):
        list(read_samples(DatasetReport(path)))


def test_keys_that_are_null_in_a_table_row_are_missing_in_the_record(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"id": "i", "type": "function", "function": {"name": "g", "arguments": {"y": 2}}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [made], "weight": 1.0}],
         "tools": [{"name": made["function"]["name"], "parameters": {"properties": made["function"]["arguments"]}}]}
        for made in (call, other)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    first, second = (sample.content for sample in read_samples(DatasetReport(tmp_path / "t.parquet")))
    assert first.messages[0] == {"role": "user", "content": "q"}
    assert first.messages[1]["tool_calls"] == [{"type": "function", **call}]
    assert second.messages[1]["tool_calls"] == [other]
    assert second.tools == [{"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": 2}}}}]


def test_a_git_lfs_pointer_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DatasetError, match="Git LFS pointer"):
        check_dataset(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.jsonl", "does not exist"),
        ("x.txt", "does not end in"),
        ("empty", "contains no file of these formats"),
        ("n" * 300 + ".csv", "cannot be read"),
        ("pipe.csv", "is not a regular file"),
    ],
)
def test_a_path_that_is_not_a_dataset_is_rejected_before_reading(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DatasetError, match=said):
        check_dataset(tmp_path / name)


def test_an_empty_file_is_rejected(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DatasetError, match="is empty"):
        check_dataset(path).raise_for_faults()


def test_the_hash_depends_on_the_content_of_the_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    before = dataset_hash(path)
    assert dataset_hash(path) == before
    write_jsonl(path, [{"text": "b"}])
    assert dataset_hash(path) != before


FIELDS = [
    "messages", "conversations", "role", "content", "from", "value", "text", "type", "prompt", "completion",
    "tools", "functions", "instruction", "input", "output", "history", "system", "tool_calls", "function_call",
    "function", "name", "arguments", "id", "weight", "train", "reasoning_content", "thinking", "chosen",
    "rejected", "label", "images",
]  # fmt: skip
ROLES = ["user", "assistant", "tool", "system", "function_call", "gpt", "text"]
LEAVES = (
    st.none() | st.booleans() | st.floats(0, 1) | st.text(st.characters()) | st.sampled_from([*ROLES, "[]", '{"name": "f"}'])
)


RECORDS = st.recursive(LEAVES, lambda s: st.lists(s) | st.dictionaries(st.sampled_from(FIELDS), s), max_leaves=16)


@settings(max_examples=300)
@given(RECORDS, st.sampled_from(["sft", "dpo", "orpo", "kto", "grpo"]))
def test_no_record_crashes_the_check(tmp_path_factory: pytest.TempPathFactory, record: object, method: Method) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("fuzz") / "t.jsonl", [record])
    report = check_dataset(path, parse=parser_of(method))
    assert report.sample_count + len(report.faults) == 1
    for fault in report.faults:
        str(fault).encode()
