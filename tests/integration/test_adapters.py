"""A served model computes the logits of the trained model, and adapters that do not fit are refused."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import HELDOUT, make_tiny_model
from training import TinyRun
from transformers import AutoModelForCausalLM

from sage.common.errors import ModelError
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
from sage.libs.models import adapters
from sage.libs.models.adapters import attach_adapter, merged
from sage.libs.models.loading import load_causal_lm
from sage.libs.models.resolve import resolve_model
from sage.llm.workers.packed import Part
from sage.llm.workers.runners import runner_for

#: Options of runs: all ways to train embeddings and head, and other kinds of adapters.
TOUCHED: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA on the embeddings, without our kernels": {"target_modules": ["q_proj", "embed_tokens"], "fast_kernels": "off"},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embeddings saved whole": {"modules_to_save": ["embed_tokens"]},
    "both saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head saved whole, LoRA on the embeddings": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
    "DoRA on the embeddings": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "rank-stabilised": {"use_rslora": True},
    "full": {"finetuning_type": "full"},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        make_tiny_model(root / name, tie_word_embeddings=name == "tied")
    return {name: root / name for name in ("tied", "untied")}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result = model.eval()(input_ids=torch.arange(3, 90, device=model.device)[None], use_cache=False).logits.cpu()
    assert isinstance(result, torch.Tensor)
    return result


def served(folder: Path) -> Any:
    source = resolve_model(str(folder))
    if source.base is None:
        return load_causal_lm(source.folder, torch.float32)
    return merged(attach_adapter(load_causal_lm(source.base.folder, torch.float32), source.folder))


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}],
)
def test_an_adapter_with_a_weight_that_is_not_finite_is_not_merged(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = get_peft_model(load_causal_lm(tiny_model, torch.float32), LoraConfig(**{"target_modules": ["q_proj"], **config}))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for name, weight in load_file(file).items():
        weight.view(-1)[0] = float("nan")
        save_file({**load_file(file), name: weight}, file)
        with pytest.raises(ModelError, match="not finite numbers") as caught:
            attach_adapter(load_causal_lm(tiny_model, torch.float32), tmp_path)
        assert caught.value.code == "adapter_not_finite"
        model.save_pretrained(tmp_path)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


def trained(model: Path, output: Path, **options: Any) -> tuple[TrainingRun, torch.Tensor]:
    """Train a few steps. Return the run, and the logits of its model after the last step."""
    values = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "eval_path": str(HELDOUT), **options}
    run = TinyRun(model, output, **values)
    training = TrainingRun(run.manager.run_directory(run.task_id), StopRequest())
    training.train()
    run.completed()
    with training.loaded.kernels.disabled() if training.loaded.kernels else contextlib.nullcontext():
        return training, logits(training.loaded.model)


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("touched", TOUCHED)
def test_a_served_model_computes_the_logits_of_the_trained_model(
    models: dict[str, Path], tmp_path: Path, touched: str, head: str
) -> None:
    _, expected = trained(models[head], tmp_path / "out", **TOUCHED[touched])
    before = logits(load_causal_lm(models[head], torch.float32))
    assert (expected - before).abs().max() > 0.01  # training has changed the model
    model = served(tmp_path / "out")
    assert same(logits(model), expected)
    model.save_pretrained(tmp_path / "merged")
    assert same(logits(load_causal_lm(tmp_path / "merged", torch.float32)), expected)


def test_training_can_start_from_an_adapter_on_a_tied_head(models: dict[str, Path], tmp_path: Path) -> None:
    touched = {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}
    first, expected = trained(models["tied"], tmp_path / "first", **touched)
    second, _ = trained(tmp_path / "first", tmp_path / "second", max_steps=1, learning_rate=1e-8)
    names = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    assert names[0]["base_model_name_or_path"] == names[1]["base_model_name_or_path"]
    assert second.heldout.losses[0] == pytest.approx(first.heldout.losses[3], abs=1e-5)
    assert torch.allclose(logits(served(tmp_path / "second")), expected, atol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
def test_a_merged_adapter_on_tied_weights_computes_the_logits_of_peft(
    models: dict[str, Path], tmp_path: Path, tie: bool
) -> None:
    torch.manual_seed(0)
    options = {"target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False, "ensure_weight_tying": tie}
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models["tied"], dtype=torch.float32),
        LoraConfig(r=4, task_type="CAUSAL_LM", **options),
    )
    model.save_pretrained(tmp_path / "theirs")
    assert same(logits(served(tmp_path / "theirs")), logits(model))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_served_as_peft_computes_them(
    models: dict[str, Path], tmp_path: Path, kind: type[PromptLearningConfig]
) -> None:
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(models["tied"], dtype=torch.float32)
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "theirs")
    ids = list(range(5, 25))
    runner = runner_for(served(tmp_path / "theirs").eval())
    cache = runner.new_cache(len(ids))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
        for part in (ids[:18], ids[18:19], ids[19:]):
            (found,) = runner.run([Part(cache, part)], lambda: None)
    assert same(found[-1], expected)


def adapter_on(base: Path, folder: Path, **options: Any) -> Path:
    model = load_causal_lm(base, torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def edit_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_that_does_not_fit_its_base_is_refused_with_the_reason(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_on(models["tied"], tmp_path / "adapter")
    wide = tmp_path / "wide"
    make_tiny_model(wide, width=64)
    for values, problem in (
        ({"base_model_name_or_path": str(wide)}, r"size mismatch for .*q_proj"),
        ({"target_modules": ["nothing_proj"]}, "nothing_proj"),
        ({"target_modules": ["q_proj"]}, r"no layer for the adapter's weight .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"does not contain the weight .*k_proj"),
        ({"r": "four"}, "does not fit its base model"),
        ({"peft_type": "MAGIC"}, "does not fit its base model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(adapter, copy)
        edit_config(copy, **values)
        with pytest.raises(ModelError, match=problem) as caught:
            served(copy)
        assert str(copy) in caught.value.message
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")], ids=repr
)
def test_a_lack_of_memory_is_not_reported_as_an_adapter_that_does_not_fit(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    adapter = adapter_on(models["tied"], tmp_path / "adapter")

    def allocate(*_: Any) -> None:
        raise error

    monkeypatch.setattr(adapters, "get_peft_model", allocate)
    with pytest.raises(type(error)):
        served(adapter)


@pytest.mark.parametrize("origin", ["ours", "theirs"])
def test_an_adapter_is_served_with_a_warning_if_the_weights_of_its_base_have_changed(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, origin: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(models["untied"], base)
    if origin == "ours":
        trained(base, adapter, max_steps=1)
    else:
        adapter_on(base, adapter)
    with caplog.at_level(logging.WARNING, logger="sage"):
        served(adapter)
        served(adapter)
        assert not caplog.messages
        weights = load_file(base / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        served(adapter)
    assert "was trained on a base model other than" in caplog.messages[0]


def test_a_run_does_not_resume_if_its_base_model_has_changed(models: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(models["untied"], base)
    run = TinyRun(base, tmp_path / "out", max_steps=2).trained()
    events = run.path / "events.jsonl"
    events.write_text("".join(line for line in events.open() if '"finished"' not in line))
    shutil.copy(models["tied"] / "model.safetensors", base)
    shutil.copy(models["tied"] / "config.json", base)
    with pytest.raises(ModelError, match="has changed since the run began"):
        TrainingRun(run.manager.run_directory(run.task_id), StopRequest())
