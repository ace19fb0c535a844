import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import HELDOUT, SAMPLES, chat_record, environment, wait_for, write_jsonl
from training import TinyRun

from sage.common.errors import Conflict, DatasetError, NotFound
from sage.common.training import StartedEvent
from sage.libs.finetune import FinetuneManager
from sage.libs.finetune.run.status import RunState

VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3, "gradient_checkpointing": "on"},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "packed and scored": {"pack_tokens": 300, "eval_path": str(HELDOUT), "eval_steps": 2, "keep_best": True},
    "over several epochs": {"dataset_path": None, "num_epochs": 4, "max_steps": None},
}
MORE_VARIANTS = ("plain", "dropout", "accumulation", "over several epochs")


def options(variant: str, tmp_path: Path) -> dict[str, object]:
    values = dict(VARIANTS[variant])
    if "dataset_path" in values:
        lines = [json.loads(line) for line in SAMPLES.read_text().splitlines()[:11]]
        values["dataset_path"] = str(write_jsonl(tmp_path / "few.jsonl", lines))
    return values


def test_a_run_writes_an_adapter_a_tokenizer_a_model_card_and_its_record(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", eval_path=str(HELDOUT), save_steps=5).start().completed()
    names = {file.name for file in run.output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "sage_run.json"} <= names
    story = run.run_file()
    assert story["recipe"]["lora_rank"] == 8
    assert story["metrics"]["step"] == 12
    assert story["metrics"]["heldout_loss"] < story["metrics"]["heldout_loss_before"]
    steps = run.events("step")
    assert [event["step"] for event in steps] == list(range(1, 13))
    for key in ("epoch", "loss", "token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"):
        assert steps[-1][key] is not None
    assert [event["eta_seconds"] is None for event in steps] == [True] * 9 + [False] * 3
    [started] = run.events("started")
    assert started["precision"] == "fp32: set by --precision; base not quantized"
    assert sorted(path.name for path in run.path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    assert "step 12/12" in "\n".join(run.manager.logs(run.task_id))


@pytest.mark.parametrize(
    "variant", ["packed and scored", *(pytest.param(name, marks=pytest.mark.long) for name in MORE_VARIANTS)]
)
def test_a_stopped_and_resumed_run_gives_bit_identical_results(tiny_model: Path, tmp_path: Path, variant: str) -> None:
    chosen = options(variant, tmp_path)
    whole = TinyRun(tiny_model, tmp_path / "whole", **chosen).trained()
    parts = TinyRun(tiny_model, tmp_path / "parts", **chosen).stopped_at(3)
    assert 3 <= parts.status.step < 12
    assert (parts.output / "adapter_model.safetensors").is_file()
    assert parts.adapter_bytes() != whole.adapter_bytes()
    assert parts.resumed().losses() == whole.losses()
    assert parts.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_a_resumed_run_with_an_8_bit_base_gives_bit_identical_results(tiny_model: Path, tmp_path: Path) -> None:
    def begun(name: str) -> TinyRun:
        run = TinyRun(tiny_model, tmp_path / name, pack_tokens=300, eval_path=str(HELDOUT), sample_prompts=["Hello"])
        numbers = {"bf16": False, "bf16_products": False, "int8_products": True}
        run.manager.run_directory(run.task_id).append_event(StartedEvent(step=0, total_steps=12, **numbers))
        return run

    whole, parts = begun("whole").trained(), begun("parts").stopped_at(3).resumed()
    assert parts.losses() == whole.losses()
    assert parts.adapter_bytes() == whole.adapter_bytes()
    *_, started = parts.events("started")
    assert started["precision"] == "fp32: chosen before the run was resumed; 8-bit base"
    assert "int8: 10 of 10 weights quantized" in started["kernels"]
    assert len(whole.events("sample")) == 2
    metrics = whole.run_file()["metrics"]
    assert metrics["heldout_loss"] < metrics["heldout_loss_before"]


def test_a_killed_worker_resumes_from_its_last_complete_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    whole = TinyRun(tiny_model, tmp_path / "whole", save_steps=4).trained()
    run = TinyRun(tiny_model, tmp_path / "out", save_steps=4).start()
    wait_for(lambda: run.status.step >= 6 and run.status.checkpoint_step, "a checkpoint and more")
    process = run.manager.process(run.task_id)
    assert process is not None
    process.send_signal(signal.SIGKILL)
    status = run.until_ended()
    assert status.state is RunState.FAILED
    assert status.code == "worker_died"
    assert f"checkpoint {status.checkpoint_step}" in str(status.hint)
    run.manager.resume(run.task_id)
    run.completed()
    assert run.losses() == whole.losses()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_again(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out").start().at_step(1)
    run.manager.stop(run.task_id, force=True)
    assert "the beginning of the run" in str(run.until_ended().hint)
    run.manager.resume(run.task_id)
    run.completed()


def test_a_run_stopped_before_its_first_step_has_an_adapter_and_can_be_resumed(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", eval_path=str(HELDOUT)).start()
    run.manager.stop(run.task_id)  # the worker has not yet installed its signal handlers
    status = run.until_ended()
    assert status.state is RunState.STOPPED
    assert (run.output / "adapter_model.safetensors").is_file()
    run.manager.resume(run.task_id)
    run.completed()


def test_a_run_can_continue_from_another_run_s_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    whole = TinyRun(tiny_model, tmp_path / "whole", save_steps=5, keep_checkpoints=9).trained()
    checkpoint = str(whole.path / "checkpoint-5")
    run = TinyRun(tiny_model, tmp_path / "out", resume_from_checkpoint=checkpoint).trained()
    assert run.losses() == {step: loss for step, loss in whole.losses().items() if step > 5}
    assert run.adapter_bytes() == whole.adapter_bytes()
    with pytest.raises(NotFound, match="is not a checkpoint"):
        TinyRun(tiny_model, tmp_path / "none", resume_from_checkpoint=str(tmp_path))


def test_a_run_killed_after_its_last_step_trains_no_more_steps(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", eval_path=str(HELDOUT)).trained()
    adapter, measured = run.adapter_bytes(), run.run_file()["metrics"]
    events = run.path / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if '"finished"' not in line]
    events.write_text("\n".join(kept) + "\n")  # as if the run had been killed during its last evaluation
    again = FinetuneManager()
    again.resume(run.task_id)
    wait_for(lambda: again.status(run.task_id).state is RunState.COMPLETED, "the end")
    assert len(run.events("step")) == 12
    assert (run.adapter_bytes(), run.run_file()["metrics"]) == (adapter, measured)


def test_the_error_says_why_a_run_cannot_be_resumed_started_or_deleted(
    tiny_model: Path, tmp_path: Path, train_file: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(train_file), max_steps=30).start().at_step(1)
    with pytest.raises(Conflict, match="is running"):
        run.manager.resume(run.task_id)
    with pytest.raises(Conflict, match="is already running"):
        run.manager.start_training(run.task_id)
    with pytest.raises(Conflict, match="is running"):
        run.manager.delete(run.task_id)
    run.manager.stop(run.task_id)
    run.until_ended()
    content = train_file.read_text()
    write_jsonl(train_file, [chat_record("new", "data")])
    with pytest.raises(Conflict, match="has changed since"):
        run.manager.resume(run.task_id)
    train_file.write_text(content)
    run.manager.resume(run.task_id)
    run.completed()
    with pytest.raises(Conflict, match="is completed"):
        run.manager.resume(run.task_id)
    run.manager.delete(run.task_id)
    assert run.task_id not in run.manager.list()
    assert (run.output / "adapter_model.safetensors").is_file()
    with pytest.raises(NotFound):
        run.manager.status(run.task_id)


def test_a_dataset_whose_answers_begin_after_the_cutoff_fails_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [chat_record("many words " * 50, "answer")] * 3)
    status = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(data), max_seq_length=32).start().until_ended()
    assert status.state is RunState.FAILED
    assert status.code == "dataset_too_long"
    assert "In all 3 sequences, the answer begins after the cutoff of 32 tokens" in str(status.message)
    assert "Raise max_seq_length" in str(status.hint)


def test_the_error_of_a_failed_training_names_the_cause(tiny_model: Path, tmp_path: Path) -> None:
    status = TinyRun(tiny_model, tmp_path / "a", target_modules=["no_such_layer"]).start().until_ended()
    assert status.code == "target_modules_unknown"
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status = TinyRun(broken, tmp_path / "b").start().until_ended()
    assert status.code == "loss_not_finite"
    assert "step 1" in str(status.message)
    with pytest.raises(DatasetError, match="does not exist"):
        TinyRun(tiny_model, tmp_path / "c", dataset_path=str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "c").exists()


def test_an_eval_split_is_held_out_and_the_same_each_time(tiny_model: Path, tmp_path: Path) -> None:
    runs = [TinyRun(tiny_model, tmp_path / name, eval_split=0.25, max_steps=2).trained() for name in "ab"]
    started = [run.events("started")[0] for run in runs]
    assert started[0]["heldout_samples"] == 23
    assert started[0]["samples"] == 92 - 23
    assert runs[0].losses() == runs[1].losses()
    assert runs[0].run_file()["metrics"] == runs[1].run_file()["metrics"]


def standalone(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "sage.libs.finetune", *arguments]
    return subprocess.Popen(argv, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_runs_without_the_control_plane_stop_on_ctrl_c_and_can_be_resumed(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base_model: {tiny_model}\ndataset_path: {SAMPLES}\noutput_dir: {tmp_path}/out\nmax_steps: 40\nbatch_size: 2\n"
    )
    process = standalone(sage_home, "train", "--config", str(config))
    assert process.stdout is not None
    task_id = process.stdout.readline().strip()
    events = sage_home / "data/models/finetuned" / task_id / "events.jsonl"
    wait_for(lambda: events.exists() and '"event": "step"' in events.read_text(), "a step")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"`resume {task_id}`" in said
    process = standalone(sage_home, "resume", task_id)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Completed: the result is in" in said
    listed, _ = standalone(sage_home, "list").communicate(timeout=60)
    assert f"{task_id}  completed  40/40" in listed
    _, said = standalone(sage_home, "resume", "task-none").communicate(timeout=60)
    assert "contains no task 'task-none'" in said


def test_a_worker_that_is_started_by_hand_completes_its_run(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1)
    argv = [sys.executable, "-m", "sage.libs.finetune.worker"]
    assert subprocess.run([*argv, str(run.path)], check=False).returncode == 0
    assert run.status.state is RunState.COMPLETED
    assert subprocess.run([*argv, str(tmp_path)], capture_output=True, check=False).returncode == 2
