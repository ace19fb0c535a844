"""Checkpoints on request, and checkpoints that are published for serving."""

from pathlib import Path

import pytest
from support import wait_for
from training import TinyRun

from sage.common.errors import ModelError
from sage.libs.finetune.run.checkpoints import list_checkpoints
from sage.libs.models.loading import load_tokenizer
from sage.libs.models.resolve import ModelKind, resolve_model


def test_a_checkpoint_on_request_does_not_change_the_result_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    plain = TinyRun(tiny_model, tmp_path / "plain", max_steps=6, lora_dropout=0.1).trained()
    asked = TinyRun(tiny_model, tmp_path / "asked", max_steps=6, lora_dropout=0.1)
    asked.manager.request_checkpoint(asked.task_id)
    asked.trained()
    assert [[event["step"] for event in run.events("checkpoint")] for run in (plain, asked)] == [[6], [1, 6]]
    assert asked.losses() == plain.losses()
    assert asked.adapter_bytes() == plain.adapter_bytes()


def test_a_worker_saves_a_checkpoint_on_request_and_ignores_requests_from_before_its_start(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=100_000, save_steps=100_000)
    run.manager.request_checkpoint(run.task_id)
    run.start().at_step(2)
    assert run.events("checkpoint") == []
    run.manager.request_checkpoint(run.task_id)
    wait_for(lambda: run.events("checkpoint"), "a checkpoint")
    assert run.events("checkpoint")[0]["step"] >= 2
    run.manager.stop(run.task_id)
    run.until_ended()


def test_a_published_checkpoint_is_an_adapter_with_a_tokenizer_and_is_kept_after_pruning(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=6, save_steps=2, keep_checkpoints=1).trained()
    [last] = list_checkpoints(run.path)
    content = (last.path / "adapter_model.safetensors").read_bytes()
    folder = run.manager.publish_checkpoint(run.task_id, last.step)
    assert folder == run.manager.publish_checkpoint(run.task_id, last.step)  # a repeated request changes nothing
    for file in last.path.iterdir():
        file.unlink()
    source = resolve_model(str(folder))
    assert (source.kind, source.base and source.base.folder) == (ModelKind.ADAPTER, tiny_model)
    assert (folder / "adapter_model.safetensors").read_bytes() == content
    assert load_tokenizer(folder).chat_template == load_tokenizer(tiny_model).chat_template
    assert not any(file.name.startswith(("optimizer", "trainer_state", "manifest")) for file in folder.iterdir())
    with pytest.raises(OSError, match="checkpoint-2"):
        run.manager.publish_checkpoint(run.task_id, 2)  # this checkpoint was pruned


def test_only_the_two_newest_published_checkpoints_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=3, save_steps=1, keep_checkpoints=3).trained()
    for step in (1, 2, 3):
        run.manager.publish_checkpoint(run.task_id, step)
    assert sorted(folder.name for folder in (run.path / "served").iterdir()) == ["step-2", "step-3"]


def test_a_checkpoint_of_full_fine_tuning_cannot_be_published(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1, finetuning_type="full").trained()
    with pytest.raises(ModelError, match="is a whole model"):
        run.manager.publish_checkpoint(run.task_id, 1)
