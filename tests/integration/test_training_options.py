"""Training runs with options other than the defaults, and with too little memory."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import HELDOUT, SAMPLES, chat_record, environment, make_tiny_model, write_jsonl
from training import TinyRun
from transformers import AutoModelForCausalLM

from sage.common import cgroups
from sage.common.errors import ModelError, OutputError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded
from sage.libs.finetune.kernels import int8
from sage.libs.finetune.run.estimate import Formats, TrainingMemory
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunState, RunStatus
from sage.libs.finetune.training import loaded, planning, stepping
from sage.libs.finetune.training.batching import Batch, PackedCollator, PaddedCollator, cut, samples_in
from sage.libs.finetune.training.model import decoder
from sage.libs.finetune.training.precision import Precision, choose_precision
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
from sage.libs.models.architecture import read_architecture
from sage.libs.models.resolve import ModelKind, resolve_model

#: Program that trains a run with a memory limit. Arguments: the run directory, a size in MiB, and optionally a cgroup.
#: Without a cgroup, the address space may grow by this size after the model is loaded. With a cgroup, the size is its limit.
LIMITED = """
import os, resource, sys
from pathlib import Path
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.training.stopping import StopRequest
from sage.libs.finetune.training.trainer import TrainingRun
import torch
torch.set_num_threads(1)
run = TrainingRun(RunDirectory(Path(sys.argv[1])), StopRequest())
room = int(sys.argv[2]) * 2**20
if len(sys.argv) == 3:
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
else:
    group = Path(sys.argv[3])
    (group / "cgroup.procs").write_text(str(os.getpid()))
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (group / name).exists():
            (group / name).write_text(str(room))  # what a process holds does not move with it
run.train()
"""


def adapter(run: TinyRun) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((run.output / "adapter_config.json").read_text())
    return config, load_file(run.output / "adapter_model.safetensors")


def test_peft_options_take_effect(tiny_model: Path, tmp_path: Path) -> None:
    options = {"exclude_modules": ["q_proj"], "modules_to_save": ["norm"], "use_rslora": True, "loraplus_lr_ratio": 4}
    run = TinyRun(tiny_model, tmp_path / "out", **options, max_steps=1, warmup_steps=0).trained()
    config, weights = adapter(run)
    assert config["use_rslora"] is True
    assert "base_model.model.model.norm.weight" in weights
    assert any("k_proj" in name for name in weights)
    assert not any("q_proj" in name for name in weights)
    largest_b = max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name)
    assert largest_b == pytest.approx(4 * 1e-2, rel=1e-3)  # AdamW's first step changes a weight by one learning rate


def test_training_can_start_from_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    first = TinyRun(tiny_model, tmp_path / "first", lora_rank=4).trained()
    steady = {"lr_scheduler": "constant", "warmup_steps": 0, "learning_rate": 1e-6}
    again = TinyRun(tiny_model, tmp_path / "again", max_steps=1, **steady).trained()
    second = TinyRun(first.output, tmp_path / "second", max_steps=1, **steady).trained()
    assert second.losses()[1] < again.losses()[1]  # both runs train on the same samples
    config, weights = adapter(second)
    assert config["r"] == 4
    for name, weight in adapter(first)[1].items():
        assert torch.allclose(weights[name], weight, atol=1e-5)
    assert second.adapter_bytes() != first.adapter_bytes()
    config["base_model_name_or_path"] = str(first.output)
    (second.output / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is an adapter whose base is an adapter too"):
        TinyRun(second.output, tmp_path / "third")


def test_dora_trains_magnitudes(tiny_model: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", use_dora=True, max_steps=2).trained()
    config, weights = adapter(run)
    assert config["use_dora"] is True
    assert any("lora_magnitude_vector" in name for name in weights)


def test_early_stopping_ends_the_run_and_keeps_the_best_adapter(tiny_model: Path, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [json.loads(line) for line in SAMPLES.read_text().splitlines()[:6]])
    run = TinyRun(
        tiny_model, tmp_path / "out", dataset_path=str(few), eval_path=str(HELDOUT), learning_rate=0.3, warmup_steps=0,
        lr_scheduler="constant", max_steps=60, eval_steps=2, early_stopping_patience=2, keep_best=True, keep_checkpoints=1,
        sample_prompts=["Who are you?"],
    ).trained()  # fmt: skip
    losses = {event["step"]: event["loss"] for event in run.events("eval")}
    assert all(later - earlier == 2 for earlier, later in pairwise(losses))
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert max(losses) == best + 4 < 60
    assert run.status.heldout_loss == losses[best]
    metrics = run.run_file()["metrics"]
    assert metrics == {
        "step": best, "total_steps": 60, "heldout_loss_before": losses[0], "heldout_loss": losses[best],
    }  # fmt: skip
    samples = run.events("sample")
    assert [event["step"] for event in samples] == list(losses)
    assert {event["prompt"] for event in samples} == {"Who are you?"}
    assert len({event["answer"] for event in samples}) > 1
    checkpoint = run.path / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert load_file(checkpoint).keys() == adapter(run)[1].keys()
    assert all(torch.equal(weight, adapter(run)[1][name]) for name, weight in load_file(checkpoint).items())


def test_a_run_that_diverges_fails_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    shutil.copytree(tiny_model, loud)
    weights = load_file(loud / "model.safetensors")
    weights["model.norm.weight"] *= 1000  # makes the model very confident in wrong tokens
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    status = TinyRun(loud, tmp_path / "out", learning_rate=1e-7).start().until_ended()
    assert status.state is RunState.FAILED
    assert status.code == "loss_exploded"
    assert "for 10 steps" in str(status.message)
    assert "at step 10" in str(status.message)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group for memory, inside the control group of this process."""
    for own in cgroups.own_groups("memory"):
        group = own / f"sage-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("needs the right to make a control group for memory")


def test_the_estimated_memory_is_reported_before_the_first_step_and_the_measured_peak_after_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", max_steps=1).trained()
    [started], [step] = run.events("started"), run.events("step")
    sizes = read_architecture(tiny_model)
    assert sizes
    needs = TrainingMemory(sizes, run.config, Formats(), has_kernels=True)
    assert needs.at([1]).adapter_bytes == 4 * started["trainable_parameters"]
    assert any("the run needs about" in event["message"] for event in run.events("progress"))
    assert step["peak_memory_bytes"] >= step["memory_bytes"]
    memory = run.run_file()["memory"]
    assert memory["estimated_memory_bytes"] == started["estimated_memory_bytes"]
    assert memory["peak_memory_bytes"] >= step["peak_memory_bytes"]
    assert run.status.training_progress().memory_estimate_error_ratio == pytest.approx(
        started["estimated_memory_bytes"] / step["peak_memory_bytes"] - 1
    )


def test_a_model_larger_than_the_memory_is_refused_before_the_data_is_read(tiny_model: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(tiny_model, huge)
    numbers = 2**38
    header = {"model.layers.0.w.weight": {"dtype": "BF16", "shape": [2**19, 2**19], "data_offsets": [0, 2 * numbers]}}
    text = json.dumps(header).encode()
    with (huge / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * numbers)  # a sparse file uses almost no disk space
    run = TinyRun(huge, tmp_path / "out").start()
    status = run.until_ended()
    assert (status.state, status.code) == (RunState.FAILED, "model_too_large")
    assert re.search(r"need 1[\d.]+ GB of memory, but only [\d.]+ GB are free", str(status.message))
    assert not any("reading" in event["message"] for event in run.events("progress"))


def limited(run: TinyRun, home: Path, mebibytes: int, *group: Path) -> str:
    """Train with this much additional address space, or in a control group of this size; return the log."""
    argv = [sys.executable, "-c", LIMITED, str(run.path), str(mebibytes), *map(str, group)]
    return subprocess.run(argv, env=environment(home), capture_output=True, text=True, check=False).stderr


def in_the_least_memory(new_run: Callable[[str], TinyRun], home: Path, *group: Path) -> tuple[TinyRun, int]:
    """Return the run that completes with the least memory, and its limit in MiB.

    How much the libraries themselves need depends on the processor, so no single limit is right on every machine.
    Raises AssertionError if a run with less memory fails for another reason than memory, or if no run completes.
    """
    for mebibytes in (32, 44, 60, 80, 108, 146):
        run = new_run(f"within-{mebibytes}")
        log = limited(run, home, mebibytes, *group)
        if run.status.state is RunState.COMPLETED:
            return run, mebibytes
        assert group or "memory" in log.lower(), log[-3000:]  # in a control group, the kernel kills without a log
    raise AssertionError(log[-3000:])


@pytest.mark.parametrize(
    "batching",
    [
        {"batch_size": 32},
        pytest.param({"pack_tokens": 9000}, marks=pytest.mark.long),
        pytest.param({"batch_size": 32, "fast_kernels": "off"}, marks=pytest.mark.long),
    ],
)
def test_too_little_memory_halves_the_micro_batch_and_does_not_change_the_losses(
    tmp_path: Path, sage_home: Path, batching: dict[str, Any]
) -> None:
    make_tiny_model(tmp_path / "model", width=256, layers=4)
    options = {**batching, "max_steps": 3}
    roomy = TinyRun(tmp_path / "model", tmp_path / "roomy", **options).trained()
    run, _ = in_the_least_memory(lambda name: TinyRun(tmp_path / "model", tmp_path / name, **options), sage_home)
    assert any("Out of memory: computing micro-batches in" in text for text in run.status.warnings)
    assert run.status.halvings >= 1
    assert run.losses() == pytest.approx(roomy.losses(), rel=1e-3)
    accuracies = [[event["token_accuracy"] for event in each.events("step")] for each in (run, roomy)]
    assert accuracies[0] == pytest.approx(accuracies[1], rel=0.05)


@pytest.mark.long
def test_the_memory_limit_of_a_container_halves_the_micro_batch(tmp_path: Path, sage_home: Path, cgroup: Path) -> None:
    make_tiny_model(tmp_path / "model", width=256, layers=4)
    options = {"batch_size": 32, "max_steps": 3}
    run, _ = in_the_least_memory(lambda name: TinyRun(tmp_path / "model", tmp_path / name, **options), sage_home, cgroup)
    assert run.status.halvings >= 1


@pytest.mark.long
def test_gradient_checkpointing_is_enabled_if_a_single_sample_does_not_fit_into_memory(
    tmp_path: Path, sage_home: Path
) -> None:
    make_tiny_model(tmp_path / "model", width=768, layers=4)
    data = write_jsonl(tmp_path / "long.jsonl", [chat_record("words " * 150, "answers " * 100)] * 2)

    def run_with(name: str, checkpointing: str) -> TinyRun:
        options = {"dataset_path": str(data), "batch_size": 2, "max_steps": 2, "gradient_checkpointing": checkpointing}
        return TinyRun(tmp_path / "model", tmp_path / name, **options)

    run, mebibytes = in_the_least_memory(lambda name: run_with(name, "auto"), sage_home)
    assert run.status.activation_checkpointing
    assert any("enabling gradient checkpointing" in text for text in run.status.warnings)
    log = limited(run_with("kept", "off"), sage_home, mebibytes)
    assert "Out of memory: a single sample of 512 tokens does not fit into memory." in log


def precision(asked: str, width: int = 64, *, use_8bit: bool = True, **begun: int) -> Precision:
    config = FinetuneConfig(base_model="m", dataset_path="d", output_dir="o", precision=asked, use_8bit=use_8bit)
    return choose_precision(config, RunStatus(**begun), width)


def test_a_run_uses_the_faster_precision_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision("bf16").bf16
    assert not precision("fp32").bf16
    for bf16, products in ((False, False), (True, False), (True, True)):
        begun = precision("auto", bf16=bf16, bf16_products=products)
        assert (begun.bf16, begun.bf16_products) == (bf16, products)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "the processor lacks bf16 instructions" in precision("auto").reason
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    chosen = precision("auto")
    measured = re.search(r"bf16 matrix products are ([\d.]+) times", chosen.reason)
    assert measured
    assert chosen.bf16 == (float(measured[1]) > 1.25) or measured[1] in ("1.2", "1.3")
    assert chosen.may_shrink == (not chosen.bf16)
    asked = precision("bf16")
    assert (asked.bf16, asked.bf16_products) == (True, chosen.bf16_products) or measured[1] in ("1.2", "1.3")


def test_the_base_model_is_stored_in_int8_if_int8_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gain, is_taken in ((1.2, False), (1.8, True)):
        monkeypatch.setattr(int8, "measured_speedup", lambda *_, gain=gain: (gain, "measured"))
        assert precision("auto").int8_products == is_taken
        assert not precision("auto", use_8bit=False).int8_products
        assert not precision("fp32").int8_products
        assert not precision("auto", bf16=False, int8_products=False).int8_products
        assert precision("auto", bf16=False, int8_products=True).int8_products
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert int8.measured_speedup(64, torch.float32) == (0.0, "the processor lacks int8 instructions")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    gain, why = int8.measured_speedup(64, torch.float32)
    assert why
    assert gain >= 0


def test_on_a_gpu_the_base_model_is_quantized_only_if_memory_is_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert not precision("auto").may_shrink  # bitsandbytes is not importable in tests
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    chosen = precision("auto")
    assert (chosen.bf16, chosen.base_bits, chosen.may_shrink) == (True, None, True)
    assert (chosen.shrunk().bf16, chosen.shrunk().base_bits) == (True, 8)
    assert precision("fp32").shrunk().base_bits == 8
    assert not precision("auto", use_8bit=False).may_shrink
    assert precision("auto", bf16=True, base_bits=8).base_bits == 8  # a resumed run keeps its number formats
    # The int8 kernels of a run that began on a CPU do not run on a GPU.
    assert not precision("auto", bf16=False, int8_products=True).int8_products
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision("auto", bf16=True, base_bits=8).base_bits is None


def test_a_run_stores_weights_in_bf16_if_memory_is_scarce(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRun(tiny_model, tmp_path / "roomy", max_steps=2, precision="fp32").trained()
    sizes = read_architecture(tiny_model)
    assert sizes
    one_token = TrainingMemory(sizes, run.config, Formats(), has_kernels=True, framework_bytes=planning.LATER_BYTES).at([1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(planning, "available_bytes", lambda: one_token.total_bytes)
    scarce = TinyRun(tiny_model, tmp_path / "scarce", max_steps=2, precision="auto").trained()
    [started] = scarce.events("started")
    assert started["precision"].startswith("bf16, matrix products in fp32: memory is scarce")
    assert (scarce.status.bf16, scarce.status.bf16_products) == (True, False)
    assert scarce.losses() == pytest.approx(run.losses(), rel=1e-2)
    assert any("micro-batches of up to" in warning for warning in scarce.status.warnings)


def test_a_model_without_kernels_uses_one_precision_for_weights_and_products(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(planning, "available_bytes", lambda: planning.LATER_BYTES + 2**20)
    monkeypatch.setattr(loaded, "install", lambda *_, **__: (None, "fallback: another model"))
    monkeypatch.setattr(int8, "measured_speedup", lambda *_: (2.0, "measured"))
    for asked, bf16 in (("auto", False), ("bf16", True)):
        run = TinyRun(tiny_model, tmp_path / asked, max_steps=1, precision=asked).trained()
        assert (run.status.bf16, run.status.bf16_products, run.status.int8_products) == (bf16, bf16, False)
        assert "base not in int8: the model's layers do not support int8" in run.events("started")[0]["precision"]


def batch(collator: PackedCollator | PaddedCollator) -> Batch:
    lengths = (5, 90, 31, 64, 7)
    return collator([(Encoded([n] * n, [IGNORED] * (n // 2) + [n] * (n - n // 2)),) for n in lengths])


@pytest.mark.parametrize("times", [0, 1, 2, 5])
def test_a_micro_batch_is_cut_between_samples(times: int) -> None:
    for collator in (PackedCollator(), PaddedCollator(0)):
        parts = cut(batch(collator), times)
        assert len(parts) == min(2**times, 5)
        assert sum(map(samples_in, parts)) == 5
        ids = torch.cat([part["input_ids"][part["attention_mask"].bool()] for part in parts])
        assert ids.tolist() == [n for n in (5, 90, 31, 64, 7) for _ in range(n)]
        labels = torch.cat([part["labels"][part["attention_mask"].bool()] for part in parts])
        assert labels.tolist() == batch(collator)["labels"][batch(collator)["attention_mask"].bool()].tolist()


def test_a_part_of_a_packed_micro_batch_is_a_packed_micro_batch() -> None:
    for part in cut(batch(PackedCollator()), 2):
        tokens = part["cu_seq_lens_q"][-1]
        assert part["cu_seq_lens_q"][0] == 0
        assert part["input_ids"].shape[1] % 64 == 0
        assert int(part["attention_mask"].sum()) == tokens
        assert int((part["position_ids"][0, :tokens] == 0).sum()) == samples_in(part)


def test_full_fine_tuning_writes_a_model_that_loads_and_resumes_exactly(tiny_model: Path, tmp_path: Path) -> None:
    options = {
        "finetuning_type": "full", "learning_rate": 1e-3, "max_steps": 8, "save_steps": 4, "eval_path": str(HELDOUT),
        "eval_steps": 4, "keep_best": True,
    }  # fmt: skip
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    cut = TinyRun(tiny_model, tmp_path / "cut", **options).stopped_at(2)
    assert AutoModelForCausalLM.from_pretrained(cut.output).num_parameters() > 50_000
    assert cut.resumed().losses() == whole.losses()
    weights, trained = (load_file(folder / "model.safetensors") for folder in (tiny_model, whole.output))
    assert trained.keys() == weights.keys()
    assert all(not torch.equal(weights[name], trained[name]) for name in weights if "layernorm" not in name)
    assert load_file(cut.output / "model.safetensors").keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in load_file(cut.output / "model.safetensors").items())
    assert whole.status.heldout_loss is not None
    assert whole.status.heldout_loss < (whole.status.heldout_loss_before or 0)
    assert resolve_model(str(whole.output)).kind is ModelKind.FULL
    with pytest.raises(OutputError, match="contains the result of"):
        TinyRun(tiny_model, whole.output)


def test_full_fine_tuning_keeps_the_names_and_the_dtype_of_the_weights(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    run = TinyRun(tmp_path / "model", tmp_path / "out", finetuning_type="full", max_steps=1).trained()
    stored, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run.output))
    assert {name: weight.dtype for name, weight in trained.items()} == dict.fromkeys(stored, torch.bfloat16)
    assert json.loads((run.output / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.long
def test_the_weight_of_a_dataset_sets_how_often_its_samples_are_used(tiny_model: Path, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [chat_record(f"Question {number}?", "Yes.") for number in range(10)])
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=[f"{SAMPLES}=0.5", f"{few}=2.5"], max_steps=1).start()
    (started,) = run.completed().events("started")
    assert started["samples"] == round(len(SAMPLES.read_text().splitlines()) / 2) + 25
    assert "`few.jsonl`" in (run.output / "README.md").read_text()
    run = TinyRun(tiny_model, tmp_path / "none", dataset_path=[f"{few}=0.01"]).start()
    assert "no sample is selected" in str(run.until_ended().message)


def test_held_out_samples_are_not_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [chat_record(f"Question {number}?", "Yes.") for number in range(10)])
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=f"{few}=3", eval_split=0.2)
    training = TrainingRun(RunDirectory(run.path), StopRequest())
    held = [tuple(sample.ids) for sample in training.heldout.samples]
    learnt = [tuple(sample.ids) for pack in training.data.packs for sample in pack]
    assert (len(set(held)), len(held), len(set(learnt)), len(learnt)) == (2, 2, 8, 24)
    assert not {*held} & {*learnt}


@pytest.mark.parametrize("fast_kernels", ["auto", "off"])
def test_embedding_noise_is_scaled_by_the_length_of_each_sample(tiny_model: Path, tmp_path: Path, fast_kernels: str) -> None:
    run = TinyRun(tiny_model, tmp_path / "out", neftune_noise_alpha=5, fast_kernels=fast_kernels)
    training = TrainingRun(RunDirectory(run.path), StopRequest())
    table = decoder(training.loaded.model).get_input_embeddings()
    added: list[torch.Tensor] = []
    table.register_forward_hook(lambda module, asked, given: added.append(given - module.weight[asked[0]]))
    samples = [Encoded([5] * length, [5] * length) for length in (8, 200)]
    batch = training.loaded.collator([(sample,) for sample in samples])
    labels = batch.pop("labels")
    training.loaded.model.train()
    training.loaded.model(**batch, use_cache=False)
    noise = added[0][labels != IGNORED].abs()
    for part, length in ((noise[:7], 8), (noise[7:], 200)):
        limit = 5 / (length * table.embedding_dim) ** 0.5
        assert 0.9 * limit < float(part.max()) <= limit * 1.001
    training.loaded.model.eval()
    training.loaded.model(**batch, use_cache=False)
    assert not added[1].any()


@pytest.mark.long
def test_a_run_on_a_streamed_dataset_learns_and_resumes_exactly(tiny_model: Path, tmp_path: Path, sage_home: Path) -> None:
    options = {"pack_tokens": 300, "streaming": True, "max_steps": 20, "save_steps": 100}
    whole = TinyRun(tiny_model, tmp_path / "whole", **options).trained()
    cut = TinyRun(tiny_model, tmp_path / "cut", **options).stopped_at(12)
    assert cut.resumed().losses() == whole.losses()
    assert whole.losses()[20] < whole.losses()[1]
    assert not list(sage_home.rglob("tokens.bin"))


def test_an_invalid_line_of_a_streamed_dataset_is_reported_with_its_number(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat_record("Is it?", "Yes.")] * 300)
    run = TinyRun(tiny_model, tmp_path / "out", dataset_path=str(data), streaming=True, max_steps=400)
    data.write_text(data.read_text() + "{broken\n")
    assert "data.jsonl:301: not valid JSON" in str(run.start().until_ended().message)


def test_if_memory_is_scarce_the_largest_micro_batch_is_tried_first_without_changing_the_result(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    step = stepping.AdaptingTrainer._adapted_step

    def counted(self: Any, model: Any, inputs: Any, count: Any) -> Any:
        tokens.append(int(inputs["attention_mask"].sum()))
        return step(self, model, inputs, count)

    monkeypatch.setattr(stepping.AdaptingTrainer, "_adapted_step", counted)
    options = {"max_steps": 3, "lora_dropout": 0.2, "batch_size": 2}
    roomy = TinyRun(tiny_model, tmp_path / "roomy", **options).trained()
    assert len(tokens) == 3
    monkeypatch.setattr(planning, "_SCARCE_SHARE", 0)
    scarce = TinyRun(tiny_model, tmp_path / "scarce", **options).trained()
    assert len(tokens) == 3 + 4
    assert tokens[3] >= max(tokens)
    assert scarce.losses() == roomy.losses()
    assert scarce.adapter_bytes() == roomy.adapter_bytes()
    accuracies = [[event["token_accuracy"] for event in run.events("step")] for run in (roomy, scarce)]
    assert accuracies[0] == accuracies[1]
