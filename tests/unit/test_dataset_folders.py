"""In a dataset folder, the split train is used for training, validation for evaluation, and test is never used."""

import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import write_jsonl

from sage.common.errors import DatasetError
from sage.libs.finetune.data.folders import select_files
from sage.libs.finetune.data.linting import DatasetReport, read_samples


def laid_out(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".json", ".md")):
            (folder / name).write_text("{}")
        else:
            write_jsonl(folder / name, [{"text": name}])
    return folder


def saved(folder: Path, text: str) -> None:
    """Write a dataset as `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    table = pa.table({"text": [text]})
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    write_jsonl(folder / "cache-1.arrow", [])


def names_of(folder: Path, split: Literal["train", "validation"] = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in select_files(folder, split).files]


@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
        (["TRAIN.JSONL", "Dev.jsonl"], ["TRAIN.JSONL"], ["Dev.jsonl"]),
        (["a_train_1.jsonl", "a_train_2.jsonl", "a_eval.jsonl"], ["a_train_1.jsonl", "a_train_2.jsonl"], ["a_eval.jsonl"]),
        (["facts.jsonl", "more.jsonl"], ["facts.jsonl", "more.jsonl"], ["facts.jsonl", "more.jsonl"]),
        (["facts.jsonl", "test.jsonl"], ["facts.jsonl"], None),
        (["contest.jsonl", "retrained.jsonl"], ["contest.jsonl", "retrained.jsonl"], ["contest.jsonl", "retrained.jsonl"]),
        (["train_test.jsonl", "val.jsonl"], None, ["val.jsonl"]),
        (["train.jsonl", "notes.jsonl", "test.jsonl"], ["train.jsonl"], None),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], None),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"],
         ["validation/a.jsonl"]),
        (["train-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], ["train-00000-of-00001.jsonl"], None),
        (["parts.jsonl", "dataset_info.json", "._parts.jsonl", ".cache/train.jsonl"], ["parts.jsonl"], ["parts.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split_are_selected(
    tmp_path: Path, files: list[str], train: list[str] | None, validation: list[str] | None
) -> None:
    laid_out(tmp_path, *files)
    splits: dict[Literal["train", "validation"], list[str] | None] = {"train": train, "validation": validation}
    for split, expected in splits.items():
        if expected is None:
            with pytest.raises(DatasetError, match=f"but no {split} data"):
                select_files(tmp_path, split)
        else:
            assert names_of(tmp_path, split) == expected


def test_the_report_lists_read_and_omitted_files(tmp_path: Path) -> None:
    report = DatasetReport(laid_out(tmp_path, "train.jsonl", "valid.jsonl", "test.jsonl"))
    assert [sample.content for sample in read_samples(report)] == ["train.jsonl"]
    assert [file.name for file in report.files] == ["train.jsonl"]
    assert [file.name for file in report.skipped_files] == ["test.jsonl", "valid.jsonl"]


def test_a_file_that_is_given_explicitly_is_read_regardless_of_its_name(tmp_path: Path) -> None:
    laid_out(tmp_path, "train.jsonl", "test.jsonl")
    assert select_files(tmp_path / "test.jsonl", "validation").files == [tmp_path / "test.jsonl"]


@pytest.mark.parametrize(
    "files", [["data/train_sft-00000-of-00001.jsonl", "data/train_prefs-00000-of-00001.jsonl"], ["en/a.jsonl", "fr/a.jsonl"]]
)
def test_a_folder_with_several_datasets_is_rejected(tmp_path: Path, files: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"train_prefs, train_sft|en, fr"):
        select_files(laid_out(tmp_path, *files))


def test_a_dataset_written_by_save_to_disk_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "one", "a")
    report = DatasetReport(tmp_path / "one")
    [sample] = read_samples(report)
    assert (sample.content, sample.origin.place) == ("a", "record 1")
    for split in ("train", "test"):
        saved(tmp_path / "dict" / split, split)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    report = DatasetReport(tmp_path / "dict")
    assert [sample.content for sample in read_samples(report)] == ["train"]
    assert [path.name for path in report.skipped_files] == ["test"]
    with pytest.raises(DatasetError, match="no validation data"):
        select_files(tmp_path / "dict", "validation")
    (tmp_path / "one/data-00000-of-00001.arrow").unlink()
    with pytest.raises(DatasetError, match="lacks the file data-00000-of-00001"):
        select_files(tmp_path / "one")


def test_arrow_files_are_read_in_the_stream_and_the_file_format(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
        assert [sample.content for sample in read_samples(DatasetReport(tmp_path / name))] == ["a", "b"]


def test_the_card_of_a_repository_assigns_files_to_splits(tmp_path: Path) -> None:
    laid_out(tmp_path, "first.jsonl", "held/out.jsonl")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: small\n  data_files: other.parquet\n- config_name: default\n"
        "  data_files:\n  - split: train\n    path: first.*\n  - split: dev\n    path: [held/*.jsonl]\n---\n# Card\n"
    )
    assert names_of(tmp_path) == ["first.jsonl"]
    assert names_of(tmp_path, "validation") == ["held/out.jsonl"]
    text = (tmp_path / "README.md").read_text().replace("default", "large")
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(DatasetError, match="several datasets \\(small, large\\)"):
        select_files(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs: [3\n---\n")
    assert names_of(tmp_path) == ["first.jsonl", "other.parquet"]
