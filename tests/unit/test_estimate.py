import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from sage.common.errors import ModelError, RunError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import Formats, TrainingMemory, batch_limit, check_memory, expected_kernels
from sage.libs.finetune.training.memory import available_bytes, peak_bytes, used_bytes
from sage.libs.models.architecture import read_architecture
from sage.libs.models.gguf import gguf_header

#: A model with a vocabulary of 100 tokens, hidden size 8 and two layers. Each layer has two matrices: 24 x 8 and 8 x 24.
SHAPES = {
    "model.embed_tokens.weight": [100, 8],
    "model.norm.weight": [8],
    **{f"model.layers.{i}.mlp.up_proj.weight": [24, 8] for i in range(2)},
    **{f"model.layers.{i}.mlp.down_proj.weight": [8, 24] for i in range(2)},
}
CONFIG = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
          "intermediate_size": 24, "max_position_embeddings": 512}  # fmt: skip
ENDS = 4 * 32  #: sum of the input and output sizes of the layers' four matrices
NUMBERS = 100 * 8 + 8 + 4 * 24 * 8
FP32, BF16 = Formats(), Formats(bf16=True, bf16_products=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a model's config, and weights that are zero in two safetensors files."""
    tmp_path = tmp_path / "model"
    tmp_path.mkdir()
    for part in ("embed_tokens", "layers"):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in SHAPES.items():
            if (part == "layers") == ("layers" in name):
                entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
                header[name] = entry  # type: ignore[assignment]
        text = json.dumps(header).encode()
        (tmp_path / f"{part}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def config_of(model: Path, **options: object) -> FinetuneConfig:
    values = {"base_model": str(model), "dataset_path": "d.jsonl", "output_dir": "out", "lora_rank": 2, **options}
    return FinetuneConfig.model_validate(values)


def needs(model: Path, formats: Formats = FP32, **options: object) -> TrainingMemory:
    """Return the memory of a run, if the framework and the pages of the weight files need no memory."""
    sizes, config = read_architecture(model), config_of(model, **options)
    assert sizes
    sizes = replace(sizes, file_bytes=0)
    return TrainingMemory(sizes, config, formats, expected_kernels(config, formats), framework_bytes=0)


def test_the_memory_of_a_run_is_estimated_from_the_headers_of_the_weights(model: Path) -> None:
    whole = needs(model).at([100])
    assert whole.weights_bytes == 4 * NUMBERS
    assert (whole.adapter_bytes, whole.optimizer_bytes) == (4 * 2 * ENDS, 8 * 2 * ENDS)
    assert whole.total_bytes == sum(vars(whole).values())
    half = needs(model, BF16).at([100])
    assert half.weights_bytes == whole.weights_bytes // 2
    assert half.activation_bytes == pytest.approx(whole.activation_bytes / 2, abs=8)
    four = needs(model, replace(BF16, base_bits=4)).at([100])
    assert half.weights_bytes - four.weights_bytes == pytest.approx(4 * 24 * 8 * 1.48, abs=1)
    int8 = needs(model, replace(FP32, int8=True)).at([100])
    assert whole.weights_bytes - int8.weights_bytes == pytest.approx(4 * 24 * 8 * 2.99, abs=1)


def test_each_token_adds_the_values_that_a_layer_saves(model: Path) -> None:
    saved = 2 * 8 + 2 * 8 + 2 * 4 + 2 * 24 + 7 * 2  # inputs, queries and outputs, keys and values, gate and up, LoRA
    run = needs(model)
    assert run.at([600]).activation_bytes - run.at([500]).activation_bytes == 100 * 2 * 4 * saved
    weights = 2 * 2 * 4 * 64**2  # two layers, two heads
    assert run.at([64]).activation_bytes - run.at([0]).activation_bytes == 64 * 2 * 4 * saved + weights


def test_full_fine_tuning_needs_the_moments_of_every_weight(model: Path) -> None:
    full = needs(model, finetuning_type="full", lora_rank=8, quantization=None)
    assert not full.has_kernels
    assert full.least(0).total_bytes == 16 * NUMBERS


def test_loading_is_the_peak_if_the_base_is_quantized_afterwards(model: Path) -> None:
    small = needs(model, replace(FP32, int8=True), lora_rank=1)
    assert small.at([0]).total_bytes == 4 * NUMBERS
    assert small.at([0]).loading_bytes > 0


def test_gradient_checkpointing_and_accumulation_change_the_peak(model: Path) -> None:
    run = needs(model)
    assert replace(run, checkpointing=True).at([300]).total_bytes < run.at([300]).total_bytes
    assert run.least(300) == replace(run, checkpointing=True).at([300])
    assert needs(model, gradient_accumulation_steps=2).at([300]).gradient_bytes == 4 * 2 * ENDS


def test_only_the_chosen_modules_are_trained(model: Path) -> None:
    assert needs(model, target_modules=["up_proj"]).at([1]).adapter_bytes == 4 * 2 * ENDS // 2
    assert needs(model, exclude_modules=["up_proj"]).at([1]).adapter_bytes == 4 * 2 * ENDS // 2
    assert needs(model, target_modules="(.+)+up_proj!").at([1]).adapter_bytes == 4 * 2 * ENDS  # a pattern is not evaluated
    saved = needs(model, modules_to_save=["embed_tokens"]).at([1])
    assert saved.adapter_bytes == 4 * (2 * ENDS + 800)


def test_three_processes_that_share_the_memory_need_three_times_as_much(model: Path) -> None:
    run = needs(model)
    assert replace(run, processes=3).at([100]).total_bytes == 3 * run.at([100]).total_bytes


def test_the_largest_micro_batch_that_fits_is_found(model: Path) -> None:
    run = needs(model)
    available = run.at([50] * 37).total_bytes
    assert run.fitting_samples(available, 50) == 37
    assert run.fitting_samples(available - 1, 50) == 36
    assert run.fitting_samples(0, 50) == 0


def test_the_limit_of_a_micro_batch_assumes_samples_with_the_most_memory_per_token(model: Path) -> None:
    assert batch_limit(config_of(model, batch_size=2, max_seq_length=300)) == {300: 2}
    assert batch_limit(config_of(model, pack_tokens=1024, max_seq_length=2048)) == {256: 4}


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"pack_tokens": 1024, "max_seq_length": 100}, {100: 10}),
        ({"pack_tokens": 1024, "max_seq_length": 2048}, {2048: 1}),
        ({"pack_tokens": 4096, "max_seq_length": 300}, {300: 1, 256: 14}),
        ({"pack_tokens": None, "batch_size": 3, "max_seq_length": 300}, {300: 3}),
    ],
)
def test_a_run_reserves_the_memory_of_its_largest_micro_batch(
    model: Path, options: dict[str, object], batch: dict[int, int]
) -> None:
    run = needs(model, **options)
    assert run.largest() == run.at(batch)
    assert run.largest().total_bytes >= run.at(batch_limit(run.config)).total_bytes


@pytest.mark.parametrize(
    ("options", "way"),
    [({}, "--quantization 4bit"), ({"finetuning_type": "full", "lora_rank": 8}, "train an adapter"),
     ({"quantization": "4bit"}, "use a smaller model")],
)  # fmt: skip
def test_a_model_that_does_not_fit_into_memory_is_rejected(model: Path, options: dict[str, object], way: str) -> None:
    run = needs(model, **options)
    check_memory(run, 0, run.least(0).total_bytes)
    with pytest.raises(RunError, match=r"need 0\.0 GB of memory") as caught:
        check_memory(run, 0, run.least(0).total_bytes - 1)
    assert way in str(caught.value.hint)


def gguf(**changes: int) -> bytes:
    """Return a GGUF file with three entries of metadata and one tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    counts = struct.pack("<IQQ", 3, changes.get("tensors", 1), 3)
    entries = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    entries += text("llama.block_count") + struct.pack("<II", 4, 1)
    entries += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    return b"GGUF" + counts + entries + text("blk.0.attn_q.weight") + struct.pack("<IQQIQ", 2, 8, 24, 0, 0)


def test_the_header_of_a_gguf_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf())
    metadata, shapes = gguf_header(file)
    assert metadata == {"general.architecture": "llama", "llama.block_count": 1}
    assert shapes == {"blk.0.attn_q.weight": (24, 8)}
    sizes = read_architecture(tmp_path)
    assert sizes
    assert (sizes.num_hidden_layers, list(sizes.layer_matrices)) == (1, ["blk.0.q_proj"])


@pytest.mark.parametrize("content", [b"GGML", gguf()[:60], gguf(tensors=9)])
def test_a_damaged_gguf_file_is_reported(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="not a complete GGUF file"):
        gguf_header(file)


def test_the_weights_of_a_sentence_transformers_model_may_be_in_a_subfolder(model: Path) -> None:
    inner = model.parent / "whole" / "0_Transformer"
    inner.parent.mkdir()
    model.rename(inner)
    sizes = read_architecture(inner.parent)
    assert sizes
    assert (sizes.parameters, sizes.hidden_size) == (NUMBERS, 8)


def test_a_folder_without_weights_has_no_sizes(tmp_path: Path) -> None:
    assert read_architecture(tmp_path) is None


def test_the_memory_of_this_process_and_the_available_memory_are_above_zero() -> None:
    assert 2**20 < available_bytes() < 2**50
    assert 2**20 < used_bytes() <= 2 * peak_bytes()
