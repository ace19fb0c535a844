"""The cache of tokenised datasets: a dataset is stored once, is never incomplete, and equals the dataset in memory."""

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import SAMPLES, chat_record, write_jsonl
from training import TinyRun

from sage.common.errors import DatasetError
from sage.libs.finetune.data import store
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.data.store import StoredSamples, load_or_tokenize
from sage.libs.finetune.data.tokenizing import Encoded, Encoder
from sage.libs.finetune.run.status import RunState
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
from sage.libs.models.loading import load_tokenizer


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "cache/tokenized").iterdir())


def silent(_: str) -> None:
    pass


def test_a_stored_dataset_equals_the_tokenised_dataset_and_is_created_once(tokenizer: Any, sage_home: Path) -> None:
    expected = list(Encoder(tokenizer, 64).encode(read_samples(DatasetReport(SAMPLES))))
    found = load_or_tokenize(SAMPLES, Encoder(tokenizer, 64), silent)
    assert list(found) == expected
    assert found.lengths() == [len(sequence.ids) for sequence in expected]
    assert found.stats.samples == 92
    assert found.stats.truncated > 0
    assert list(found.take([5, 1])) == [expected[5], expected[1]]
    assert found.take([5, 1]).take([1]).lengths() == [len(expected[1].ids)]
    again = Encoder(tokenizer, 64)
    assert list(load_or_tokenize(SAMPLES, again, silent)) == expected
    assert not again.lengths
    assert len(folders(sage_home)) == 1


def test_a_dataset_is_tokenised_again_if_a_setting_the_template_or_the_content_changes(
    tokenizer: Any, train_file: Path, sage_home: Path
) -> None:
    for encoder in (Encoder(tokenizer, 128), Encoder(tokenizer, 64), Encoder(tokenizer, 128, "last_turn")):
        load_or_tokenize(train_file, encoder, silent)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "sage")
    load_or_tokenize(train_file, Encoder(tokenizer, 128), silent)
    write_jsonl(train_file, [chat_record("another", "dataset")])
    load_or_tokenize(train_file, Encoder(tokenizer, 128), silent)
    assert len(folders(sage_home)) == 5


def test_only_the_user_can_read_stored_datasets(tokenizer: Any, train_file: Path, sage_home: Path) -> None:
    umask = os.umask(0o002)  # with this umask, other users can read new files
    try:
        load_or_tokenize(train_file, Encoder(tokenizer, 64), silent)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((sage_home / "cache/tokenized").stat().st_mode) == 0o700


def test_a_truncated_stored_dataset_is_created_again(tokenizer: Any, sage_home: Path) -> None:
    whole = list(load_or_tokenize(SAMPLES, Encoder(tokenizer, 128), silent))
    [folder] = folders(sage_home)
    tokens = sage_home / "cache/tokenized" / folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert list(load_or_tokenize(SAMPLES, Encoder(tokenizer, 128), silent)) == whole


def test_an_invalid_dataset_leaves_no_stored_files(tokenizer: Any, train_file: Path, sage_home: Path) -> None:
    with train_file.open("a") as file:
        file.write('{"messages": [\n{"messages": []}\n')
    with pytest.raises(DatasetError, match=r"train\.jsonl:93: not valid JSON.*train\.jsonl:94: no assistant turn"):
        load_or_tokenize(train_file, Encoder(tokenizer, 128), silent)
    assert folders(sage_home) == []


def test_two_concurrent_first_runs_share_the_dataset_that_was_stored_first(
    tokenizer: Any, train_file: Path, sage_home: Path
) -> None:
    made: list[StoredSamples] = []

    class Slower(Encoder):
        def encode(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
            made.append(load_or_tokenize(train_file, Encoder(tokenizer, 64), silent))
            inodes.extend(path.stat().st_ino for path in (sage_home / "cache/tokenized").glob("[!.]*"))
            yield from super().encode(samples)

    inodes: list[int] = []
    slower = load_or_tokenize(train_file, Slower(tokenizer, 64), silent)
    [folder] = (sage_home / "cache/tokenized").iterdir()
    assert [folder.stat().st_ino] == inodes, "a folder that another process may be reading must not be replaced"
    assert list(slower) == list(made[0])


def test_samples_stay_readable_after_their_folder_is_removed(tokenizer: Any, train_file: Path, sage_home: Path) -> None:
    samples = load_or_tokenize(train_file, Encoder(tokenizer, 64), silent)
    expected = list(samples)
    shutil.rmtree(sage_home / "cache/tokenized")
    assert list(samples.take([2, 1])) == [expected[2], expected[1]]


def test_old_folders_are_removed_and_a_folder_that_vanishes_meanwhile_is_not_an_error(
    tokenizer: Any, train_file: Path, sage_home: Path
) -> None:
    root = sage_home / "cache/tokenized"
    ages_days = {".partial-dead": 2, ".partial-alive": 0.5, "unused": 31, "used": 29}
    for name, age_days in ages_days.items():
        (root / name).mkdir(parents=True)
        (root / name / "tokens.bin").touch()
        for path in (root / name / "tokens.bin", root / name):
            os.utime(path, times=(0, time.time() - age_days * 24 * 3600))
    (root / "vanished").symlink_to(root / "nowhere")
    load_or_tokenize(train_file, Encoder(tokenizer, 64), silent)
    assert {".partial-alive", "used"} == ages_days.keys() & set(folders(sage_home))


@pytest.mark.parametrize("name", ["tokens.bin", "bounds.bin", "facts.json"])
def test_a_full_disk_leaves_no_stored_files(
    tokenizer: Any, train_file: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().name == name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        load_or_tokenize(train_file, Encoder(tokenizer, 64), silent)
    assert folders(sage_home) == []


def test_a_dataset_that_changes_while_it_is_read_is_refused(tokenizer: Any, train_file: Path, sage_home: Path) -> None:
    class Disturbed(Encoder):
        def encode(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
            yield from super().encode(samples)
            with train_file.open("a") as file:
                file.write(json.dumps(chat_record("one", "more")) + "\n")

    with pytest.raises(DatasetError, match="changed while it was read"):
        load_or_tokenize(train_file, Disturbed(tokenizer, 64), silent)
    assert folders(sage_home) == []


def test_each_split_of_a_dataset_folder_has_its_own_samples(tokenizer: Any, tmp_path: Path, sage_home: Path) -> None:
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat_record(f"{name} {i}", "a") for i in range(count)])
    told: list[str] = []
    assert len(load_or_tokenize(tmp_path, Encoder(tokenizer, 64), told.append)) == 3
    assert len(load_or_tokenize(tmp_path, Encoder(tokenizer, 64), silent, "validation")) == 2
    assert told == [f"reading the train split of {tmp_path}; not read: test.jsonl, valid.jsonl"]


def test_a_run_trains_on_the_train_split_of_a_folder_and_is_evaluated_on_the_validation_split(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        write_jsonl(folder / f"{name}.jsonl", [chat_record(f"{name} {i}", "a") for i in range(count)])
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(folder), eval_path=str(folder), max_steps=1)
    TrainingRun(run.manager.run_directory(run.task_id), StopRequest()).train()
    [started] = run.events("started")
    assert (started["samples"], started["heldout_samples"]) == (3, 2)


def test_a_run_that_is_stopped_during_tokenisation_saves_an_adapter_and_can_be_resumed(
    tiny_model: Path, tmp_path: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PROGRESS_SAMPLES", 10)
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=2)
    stop = StopRequest()
    stop.request()
    TrainingRun(run.manager.run_directory(run.task_id), stop).train()
    assert run.status.state is RunState.STOPPED
    assert (run.output / "adapter_model.safetensors").is_file()
    assert folders(sage_home) == []
    run.manager.resume(run.task_id)
    run.completed()
    assert len(folders(sage_home)) == 1
