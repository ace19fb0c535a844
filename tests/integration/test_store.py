"""Tokenised datasets on disk: as in memory, made once, whole or absent."""

from pathlib import Path
from typing import Any

import pytest
from support import SAMPLES, chat_record, write_jsonl
from training import TinyRun

from sage.common.errors import DatasetError
from sage.libs.finetune.data import store
from sage.libs.finetune.data.linting import DatasetReport, read_samples
from sage.libs.finetune.data.store import stored
from sage.libs.finetune.data.tokenizing import Encoder
from sage.libs.finetune.status import RunState
from sage.libs.finetune.stopping import StopRequest
from sage.libs.finetune.trainer import TrainingRun
from sage.libs.models.loading import load_tokenizer


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "cache/tokenized").iterdir())


def silent(_: str) -> None:
    pass


def test_what_is_stored_is_what_is_tokenised_and_is_made_once(tokenizer: Any, sage_home: Path) -> None:
    expected = list(Encoder(tokenizer, 64).encode(read_samples(DatasetReport(SAMPLES))))
    found = stored(SAMPLES, Encoder(tokenizer, 64), silent)
    assert list(found) == expected
    assert found.lengths() == [len(sequence.ids) for sequence in expected]
    assert found.facts.samples == 92
    assert found.facts.truncated > 0
    assert list(found.take([5, 1])) == [expected[5], expected[1]]
    assert found.take([5, 1]).take([1]).lengths() == [len(expected[1].ids)]
    again = Encoder(tokenizer, 64)
    assert list(stored(SAMPLES, again, silent)) == expected
    assert not again.lengths
    assert len(folders(sage_home)) == 1


def test_other_settings_another_template_or_other_content_are_tokenised_anew(
    tokenizer: Any, train_file: Path, sage_home: Path
) -> None:
    for encoder in (Encoder(tokenizer, 128), Encoder(tokenizer, 64), Encoder(tokenizer, 128, "last_turn")):
        stored(train_file, encoder, silent)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "sage")
    stored(train_file, Encoder(tokenizer, 128), silent)
    write_jsonl(train_file, [chat_record("another", "dataset")])
    stored(train_file, Encoder(tokenizer, 128), silent)
    assert len(folders(sage_home)) == 5


def test_what_was_cut_off_is_made_again(tokenizer: Any, sage_home: Path) -> None:
    whole = list(stored(SAMPLES, Encoder(tokenizer, 128), silent))
    [folder] = folders(sage_home)
    tokens = sage_home / "cache/tokenized" / folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert list(stored(SAMPLES, Encoder(tokenizer, 128), silent)) == whole


def test_a_dataset_with_faults_leaves_nothing(tokenizer: Any, train_file: Path, sage_home: Path) -> None:
    with train_file.open("a") as file:
        file.write('{"messages": [\n{"messages": []}\n')
    with pytest.raises(DatasetError, match=r"train\.jsonl:93: not valid JSON.*train\.jsonl:94: no assistant turn"):
        stored(train_file, Encoder(tokenizer, 128), silent)
    assert folders(sage_home) == []


def test_a_stop_while_tokenising_leaves_a_model_that_loads_and_goes_on(
    tiny_model: Path, tmp_path: Path, sage_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_TOLD_SAMPLES", 10)
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
