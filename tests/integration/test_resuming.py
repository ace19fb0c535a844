"""The checkpoint that a run continues from, and checkpoints that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import HELDOUT, chat_record, write_jsonl
from training import TinyRun

from sage.common.errors import ConfigError, OutputError, RunError
from sage.common.training import FailedEvent
from sage.libs.finetune import FinetuneManager
from sage.libs.finetune.run.checkpoints import Checkpoint
from sage.libs.finetune.run.status import RunState
from sage.libs.finetune.training.export import export_result
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
from sage.libs.models.loading import load_causal_lm, load_tokenizer


def unfinished(run: TinyRun, *, since: int, scores: dict[int, float] | None = None) -> TinyRun:
    """Make a completed run look as if it was killed after the step `since`.

    scores: held-out losses by step, which replace the recorded losses.
    """
    path, kept = run.path / "events.jsonl", []
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] != "finished" and event.get("step", 0) <= since:
            event |= (
                {"loss": scores[event["step"]]} if scores and event["event"] == "eval" and event["step"] in scores else {}
            )
            kept.append(json.dumps(event))
    run.manager = FinetuneManager()
    path.write_text("\n".join([*kept, json.dumps({"event": "failed", "code": "worker_died", "message": "killed"})]) + "\n")
    return run


def damage(run: TinyRun, step: int) -> None:
    weights = run.path / f"checkpoint-{step}" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def test_a_stop_after_damaged_checkpoints_reports_and_exports_the_intact_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", save_steps=4, keep_checkpoints=9).trained()
    saved = load_file(run.path / "checkpoint-4" / "adapter_model.safetensors")
    unfinished(run, since=8)
    for step in (8, 12):
        damage(run, step)
    stop = StopRequest()
    training = TrainingRun(run.manager.run_directory(run.task_id), stop)
    stop.request()
    training.train()
    assert run.status.state is RunState.STOPPED
    assert run.status.step == 4
    assert run.run_file()["metrics"]["step"] == 4
    written = load_file(run.output / "adapter_model.safetensors")
    assert all(torch.equal(weight, written[name]) for name, weight in saved.items())
    assert sorted(path.name for path in run.path.glob("*checkpoint-*")) == [
        "checkpoint-4", "damaged-checkpoint-12", "damaged-checkpoint-8",
    ]  # fmt: skip


def test_if_one_checkpoint_is_kept_a_damaged_checkpoint_does_not_replace_an_intact_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", save_steps=4, keep_checkpoints=2).trained()
    losses = run.losses()
    unfinished(run, since=8)
    damage(run, 12)
    spec = json.loads((run.path / "spec.json").read_text())
    spec["config"] |= {"keep_checkpoints": 1, "save_steps": 1}
    (run.path / "spec.json").write_text(json.dumps(spec))
    TrainingRun(run.manager.run_directory(run.task_id), StopRequest()).train()
    assert run.losses() == losses
    assert [path.name for path in run.path.glob("checkpoint-*")] == ["checkpoint-12"]
    Checkpoint.of(run.path / "checkpoint-12").verify()


def test_a_damaged_best_checkpoint_is_reported_and_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    options = {"eval_path": str(HELDOUT), "eval_steps": 4, "save_steps": 4, "keep_best": True, "keep_checkpoints": 9}
    run = TinyRun(tiny_model, tmp_path / "out", **options).trained()
    best = 4
    unfinished(run, since=12, scores={best: 0.001})
    damage(run, best)
    TrainingRun(run.manager.run_directory(run.task_id), StopRequest()).train()
    assert run.run_file()["metrics"]["step"] == 12
    assert any(f"the checkpoint with the lowest loss (step {best})" in warning for warning in run.status.warnings)


def test_a_damaged_checkpoint_or_a_checkpoint_of_another_run_is_refused_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole = TinyRun(tiny_model, tmp_path / "whole", save_steps=5, keep_checkpoints=9).trained()
    given = {"resume_from_checkpoint": str(whole.path / "checkpoint-5")}
    others: list[dict[str, Any]] = [
        {"dataset_path": str(write_jsonl(tmp_path / "other.jsonl", [chat_record("new", "data")] * 9))},
        {"max_steps": 4}, {"max_steps": 60}, {"max_steps": None, "num_epochs": 1}, {"seed": 7}, {"lora_rank": 4},
        {"resume_from_checkpoint": str(whole.path / "checkpoint-12")},
    ]  # fmt: skip
    for options in others:
        with pytest.raises(ConfigError) as caught:
            TinyRun(tiny_model, tmp_path / "none", **{**given, **options})
        assert caught.value.code == "checkpoint_mismatch"
    assert not (tmp_path / "none").exists()
    run = TinyRun(tiny_model, tmp_path / "out", **given)
    damage(whole, 5)
    with pytest.raises(RunError, match="its checksum differs"):
        run.trained()


def test_a_preference_run_from_a_checkpoint_trains_the_remaining_steps(tiny_model: Path, tmp_path: Path) -> None:
    pair = {"prompt": "Who are you?", "chosen": "I am SAGE.", "rejected": "No."}
    data = write_jsonl(tmp_path / "pairs.jsonl", [pair] * 8)
    options = {"method": "dpo", "dataset_path": str(data), "max_steps": 4, "batch_size": 2, "save_steps": 2}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    run = TinyRun(tiny_model, tmp_path / "out", **options, resume_from_checkpoint=str(whole.path / "checkpoint-2")).trained()
    assert list(run.losses()) == [3, 4]


def test_a_resumed_run_does_not_write_into_an_output_that_another_run_has_claimed(tiny_model: Path, tmp_path: Path) -> None:
    first = TinyRun(tiny_model, tmp_path / "out", max_steps=1)
    directory = first.manager.run_directory(first.task_id)
    directory.append_event(FailedEvent(code="c", message="it never began"))
    second = TinyRun(tiny_model, tmp_path / "out", max_steps=1)
    with pytest.raises(OutputError, match=f"has not started yet: {second.task_id}"):
        first.manager.resume(first.task_id)
    first.start().until_ended()
    assert first.status.code == "output_unusable"
    second.trained()


def test_a_checkpoint_does_not_grow_with_the_steps_before_it(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out").trained()
    state = json.loads((run.path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["log_history"] == []


def test_a_result_with_several_chat_templates_can_be_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1).trained()
    spec, tokenizer = run.manager.run_directory(run.task_id).read_spec(), load_tokenizer(tiny_model)
    model = load_causal_lm(tiny_model, torch.float32)
    for answer in ("one", "two"):
        tokenizer.chat_template = {"default": "a default", "tool_use": answer}
        export_result(model, tokenizer, spec, run.path, tiny_model, {"step": 1, "total_steps": 1}, {})
        assert (run.output / "additional_chat_templates" / "tool_use.jinja").read_text() == answer
    assert not (run.output / ".partial").exists()


def test_an_incomplete_checkpoint_of_a_killed_process_is_removed(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1)
    (run.path / "staging" / "checkpoint-7").mkdir(parents=True)
    run.start().completed()
    assert not (run.path / "staging" / "checkpoint-7").exists()
