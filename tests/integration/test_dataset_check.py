"""What `dataset check`, `dataset show` and training runs report about samples before the first step."""

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import SAGE, chat_record, list_engines, write_jsonl
from training import TinyRun
from typer.testing import CliRunner, Result

from sage.cli.main import app
from sage.common.errors import DatasetError
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun

CALL = {"type": "function", "function": {"name": "root", "arguments": '{"x": 81}'}}
#: The tiny model's template renders no tool calls.
CALLING = {
    "messages": [
        {"role": "user", "content": "root of 81?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "nine"},
    ]
}
PAIR = {
    "prompt": "root of 81?",
    "chosen": [{"role": "assistant", "content": "nine", "tool_calls": [CALL]}],
    "rejected": "ten",
}


@pytest.fixture
def calls_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "calls.jsonl", [chat_record("q", "a"), CALLING])


def dataset(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["llm", "dataset", command, *map(str, arguments)])


def prepared(run: TinyRun) -> TrainingRun:
    """Load what a run needs, as its worker does."""
    return TrainingRun(run.manager.run_directory(run.task_id), StopRequest())


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_a_run_whose_samples_have_warnings_fails_unless_warnings_are_allowed(
    tiny_model: Path, tmp_path: Path, calls_file: Path, options: dict[str, Any]
) -> None:
    options |= {"dataset_path": str(calls_file), "max_steps": 1}
    for attempt in ("first", "again, from the cache"):
        run = TinyRun(tiny_model, tmp_path / attempt, **options)
        with pytest.raises(DatasetError) as caught:
            prepared(run).train()
        assert caught.value.code == "dataset_warnings"
        assert f"{calls_file}:2" in caught.value.message
        assert "tool calls" in caught.value.message
        assert "--allow-warnings" in caught.value.hint
    allowed = TinyRun(tiny_model, tmp_path / "allowed", **options, allow_warnings=True).trained()
    assert [event for event in allowed.events("warning") if "tool calls" in event["message"]]


def test_preference_pairs_are_also_checked(tiny_model: Path, tmp_path: Path) -> None:
    from sage.libs.finetune.training.preference import PreferenceRun

    pairs = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(pairs), method="dpo")
    with pytest.raises(DatasetError) as caught:
        PreferenceRun(run.manager.run_directory(run.task_id), StopRequest())
    assert caught.value.code == "dataset_warnings"
    checked = dataset("check", pairs, "--model", tiny_model, "--method", "dpo")
    assert "warning: 1 sample: the chat template leaves out tool calls" in checked.stdout
    assert checked.exit_code == 1


def test_a_run_warns_about_an_omitted_sample_and_continues(tiny_model: Path, tmp_path: Path) -> None:
    unweighed = chat_record("q", "a")
    unweighed["messages"][1]["weight"] = 0
    half = write_jsonl(tmp_path / "half.jsonl", [chat_record("q", "a"), unweighed])
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(half), max_steps=1).trained()
    [warning] = [event["message"] for event in run.events("warning") if "omitted" in event["message"]]
    assert warning.startswith("1 sample: the sample is omitted, because it has no tokens to train on")
    assert warning.endswith(f"{half}:2.")


def test_check_lists_warnings_and_fails_unless_warnings_are_allowed(tiny_model: Path, calls_file: Path) -> None:
    checked = dataset("check", calls_file, "--model", tiny_model)
    assert checked.exit_code == 1
    assert f"warning: 1 sample: the chat template leaves out tool calls: {calls_file}:2." in checked.stdout
    assert dataset("check", calls_file, "--model", tiny_model, "--allow-warnings").exit_code == 0
    told = json.loads(dataset("check", calls_file, "--model", tiny_model, "--json").stdout)
    assert [(f["code"], f["severity"], f["count"]) for f in told["findings"]] == [("calls_lost", "warning", 1)]


@pytest.mark.long
def test_a_user_at_a_terminal_is_asked_whether_to_train_despite_warnings(
    tiny_model: Path, tmp_path: Path, calls_file: Path
) -> None:
    ours, theirs = pty.openpty()
    arguments = ["--engine-kind", "finetune", "--dataset", calls_file, "--output", tmp_path / "out", "--max-steps", "1"]
    command = [*SAGE, "llm", "engine", "start", tiny_model, *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True) as started:
        os.close(theirs)
        shown = ""
        while "Train despite the warnings? [y/N]" not in shown:
            shown += os.read(ours, 4096).decode()
        assert "leaves out tool calls" in shown
        os.write(ours, b"y\n")
        with contextlib.suppress(OSError):  # reading fails when the last process has closed the terminal
            while os.read(ours, 4096):
                pass
        assert started.stdout
        stdout = started.stdout.read()
    os.close(ours)
    assert started.returncode == 0
    [engine] = list_engines().values()
    assert stdout.split() == [engine["id"]]


def test_show_prints_a_sample_as_the_model_sees_it(tiny_model: Path, tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "[bold]two.jsonl", [chat_record("q", "\x1b[31mfirst"), chat_record("What?", "日本 second")]
    )
    shown = dataset("show", file, "--model", tiny_model, "--line", 2).stdout
    assert f"{file}:2 (openai)" in shown
    assert "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦日本 second<|im_end|>⟧" in shown
    assert "\\x1b[31mfirst" in dataset("show", file, "--model", tiny_model, "--limit", 1).stdout
    cut = dataset("show", file, "--model", tiny_model, "--line", 2, "--max-seq-length", 40).stdout
    assert "⟨cut: " in cut
    [told] = json.loads(dataset("show", file, "--model", tiny_model, "--line", 2, "--json").stdout)
    [sequence] = told["sequences"]
    assert sequence["segments"][-1] == {"kind": "trained", "text": "日本 second<|im_end|>"}
    assert len(sequence["ids"]) == len(sequence["trained"])


def test_show_without_a_sample_names_the_fault_or_the_missing_line(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"a": 1}\n' + json.dumps(chat_record("q", "a")) + "\n" + '{"b": 1}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [')
    for arguments, expected in {
        (file, "--line", 3): f"{file}:3: no known format has the fields b",
        (file, "--line", 4): "has no sample with an answer on line 4",
        (broken,): f"{broken}:1: ",
    }.items():
        shown = dataset("show", *arguments, "--model", tiny_model)
        assert shown.exit_code == 1
        assert expected in str(shown.exception)
        assert "fields a" not in str(shown.exception)
