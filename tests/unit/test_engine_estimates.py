"""The estimates of all backends, for a small model with a config and weights that are all zero."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from engine_views import engine_view, training_progress

from sage.cli.estimating import estimate_lines, estimate_table
from sage.common.errors import ModelError
from sage.common.paths import get_user_paths
from sage.common.training import StartedEvent, StepEvent
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run import history
from sage.libs.finetune.run.estimate import Formats
from sage.libs.finetune.run.history import default_formats, earlier_run, training_seconds
from sage.libs.finetune.run.rundir import RunDirectory, RunSpec
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model
from sage.llm.client.types import Device, EngineKind, StartRequest
from sage.llm.control_plane.backends import environments, registry
from sage.llm.control_plane.backends.memory import ServingEstimate
from sage.llm.control_plane.backends.trainer import TrainerBackend
from sage.llm.control_plane.estimates import estimate_engine
from sage.llm.control_plane.metrics import Measured, all_metrics

CONFIG = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
          "intermediate_size": 24, "max_position_embeddings": 2048}  # fmt: skip
NUMBERS = 100 * 8 + 2 * 24 * 8
DEVICE = Device(node="n", kind="cpu", index=0, name="memory", memory_total_bytes=9 * 10**9, memory_used_bytes=10**9)
TOKEN_BYTES = 2 * 2 * 4 * 4  #: keys and values of one token: two layers, one head with head_dim 4, fp32


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens.weight": [100, 8], **{f"model.layers.{i}.mlp.up_proj.weight": [24, 8] for i in range(2)}}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return folder


def serving(weights: Path, backend: str, **options: Any) -> ServingEstimate:
    chosen = registry.BACKENDS[backend]
    estimate = chosen.estimate(resolve_model(str(weights)), chosen.options.model_validate(options))
    assert estimate
    assert isinstance(estimate.breakdown, ServingEstimate)
    assert estimate.least_bytes <= estimate.total_bytes == sum(dataclasses.astuple(estimate.breakdown))
    assert chosen.memory_bytes(resolve_model(str(weights)), chosen.options.model_validate(options)) == estimate.total_bytes
    return estimate.breakdown


@pytest.mark.parametrize(
    ("backend", "options", "weights_bytes", "cache_bytes"),
    [
        ("transformers", {"dtype": "fp32"}, 4 * NUMBERS, 16 * 512 * TOKEN_BYTES),
        ("transformers", {"dtype": "bf16", "slots": 2, "context_tokens": 64}, 2 * NUMBERS, 2 * 64 * TOKEN_BYTES // 2),
        ("transformers", {"dtype": "fp32", "kv_cache_tokens": 64}, 4 * NUMBERS, 64 * TOKEN_BYTES),
        ("openvino", {"quantize": "int8"}, NUMBERS * 105 // 100, 16 * 512 * TOKEN_BYTES),
        ("vllm", {"dtype": "bf16", "kv_cache_gb": 2}, 2 * NUMBERS, 2 * 2**30),
        ("llamacpp", {"slots": 2}, 4 * NUMBERS, 2048 * TOKEN_BYTES),
        ("llamacpp", {"quantize": "int8", "kv_cache_tokens": 64}, NUMBERS * 34 // 32, 64 * TOKEN_BYTES // 2),
        ("embedding", {}, 4 * NUMBERS, 0),
    ],
)
def test_a_server_needs_memory_for_its_weights_and_its_cache(
    weights: Path, backend: str, options: dict[str, Any], weights_bytes: int, cache_bytes: int
) -> None:
    estimate = serving(weights, backend, **options)
    assert (estimate.weights_bytes, estimate.cache_bytes) == (weights_bytes, cache_bytes)


def test_the_memory_of_a_model_that_is_not_downloaded_is_not_known() -> None:
    model = ModelSource("org/name", ModelKind.HUB, Path("/nowhere"))
    for backend in registry.BACKENDS.values():
        options = {"base_model": "org/name", "dataset_path": "d", "output_dir": "o"} if backend.name == "trainer" else {}
        assert backend.memory_bytes(model, backend.options.model_validate(options)) is None


def run_config(weights: Path, **options: Any) -> FinetuneConfig:
    values = {"base_model": str(weights), "dataset_path": "d.jsonl", "output_dir": "out", **options}
    return FinetuneConfig.model_validate(values)


def earlier(config: FinetuneConfig, *, bf16: bool, tokens_per_second: float) -> None:
    """Record a run that has completed a step."""
    run = RunDirectory(get_user_paths().finetuned_dir / "task-1")
    run.create(RunSpec("task-1", config, "hash", "2026-01-01"))
    run.append_event(StartedEvent(step=0, total_steps=1, bf16=bf16, bf16_products=bf16))
    run.append_event(StepEvent(step=1, tokens_per_second=tokens_per_second))


def test_an_estimate_uses_the_number_formats_and_the_speed_of_an_earlier_run(weights: Path) -> None:
    config, root = run_config(weights), get_user_paths().finetuned_dir
    assert earlier_run(root, config) is None
    before = TrainerBackend().memory_bytes(resolve_model(str(weights)), config)
    earlier(config, bf16=True, tokens_per_second=50.0)
    found = earlier_run(root, run_config(weights, batch_size=8))
    assert found
    assert (found.formats, found.tokens_per_second) == (Formats(bf16=True, bf16_products=True), 50.0)
    assert earlier_run(root, run_config(weights, precision="fp32")) is None
    assert (TrainerBackend().memory_bytes(resolve_model(str(weights)), config) or 0) < (before or 0)
    (root / "task-1" / "spec.json").write_text("{")
    assert earlier_run(root, config) is None


@pytest.mark.parametrize(
    ("options", "device", "formats"),
    [
        ({}, "cpu", Formats()),
        ({"precision": "bf16"}, "cpu", Formats(bf16=True, bf16_products=True)),
        ({"quantization": "4bit"}, "cuda", Formats(bf16=True, bf16_products=True, base_bits=4)),
        ({"finetuning_type": "full"}, "cuda", Formats()),
    ],
)
def test_without_an_earlier_run_the_largest_number_formats_are_assumed(
    weights: Path, options: dict[str, Any], device: str, formats: Formats
) -> None:
    assert default_formats(run_config(weights, **options), device) == formats


def test_the_least_memory_on_a_gpu_is_that_of_a_run_with_an_8_bit_base(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def least_bytes(**options: Any) -> int:
        estimate = TrainerBackend().estimate(resolve_model(str(weights)), run_config(weights, **options))
        assert estimate
        return estimate.least_bytes

    monkeypatch.setattr(environments, "device", lambda: "cuda")
    monkeypatch.setattr(history, "find_bitsandbytes", lambda: Path("/bitsandbytes"))
    assert least_bytes() < least_bytes(use_8bit=False) == least_bytes(quantization="none")


def test_the_duration_of_a_run_follows_from_its_tokens_and_the_speed(weights: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 10, "pack_tokens": 100, "gradient_accumulation_steps": 2}
    assert training_seconds(run_config(weights, **steps), 50.0) == 40
    data = tmp_path / "d.jsonl"
    data.write_bytes(bytes(4000))
    assert training_seconds(run_config(weights, dataset_path=f"{data}=2", num_epochs=3), 50.0) == 3 * 2 * 1000 / 50
    assert training_seconds(run_config(weights, **steps), None) is None
    assert training_seconds(run_config(weights), 50.0) is None


def test_a_run_with_two_processes_needs_twice_the_main_memory(weights: Path) -> None:
    model = resolve_model(str(weights))
    one, two = (TrainerBackend().memory_bytes(model, run_config(weights, num_processes=count)) for count in (1, 2))
    assert one
    assert two == 2 * one


def test_an_estimate_of_a_run_needs_neither_dataset_nor_output(weights: Path) -> None:
    request = StartRequest(model=str(weights), engine_kind=EngineKind.FINETUNE, options={"lora_rank": 4})
    estimate = estimate_engine(request, [DEVICE])
    assert estimate.total_bytes == sum(estimate.parts.values())
    assert estimate.parts["adapter"] == 4 * 4 * 2 * 32
    assert estimate.fits
    assert (estimate.fitting_samples or 0) > 1000
    assert estimate.training_seconds is None
    assert any("samples of the maximum length" in line for line in estimate_lines(estimate))
    assert estimate_table(estimate).row_count >= 5


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_an_estimate_without_a_given_backend_uses_the_backend_that_a_start_would_use(
    weights: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    monkeypatch.setattr(environments, "device", lambda: "cuda")
    monkeypatch.setattr(environments, "is_installed", lambda _: True)
    request = StartRequest(model=str(weights), options={"quantize": quantize})
    started, _ = registry.resolve("auto", EngineKind.LLM, resolve_model(str(weights)), quantize)
    assert estimate_engine(request, [DEVICE]).backend == started.name


def test_an_estimate_of_a_model_that_is_not_on_this_machine_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ModelSource("org/name", ModelKind.HUB, Path("/nowhere"))
    monkeypatch.setattr("sage.llm.control_plane.estimates.resolve_model", lambda _: model)
    with pytest.raises(ModelError, match="not on this machine"):
        estimate_engine(StartRequest(model="org/name", backend="transformers"), [DEVICE])


def test_the_error_of_an_estimate_is_a_metric() -> None:
    measured = training_progress(estimated_memory_bytes=90, peak_memory_bytes=100)
    views = [engine_view(training=measured), engine_view(training=training_progress(estimated_memory_bytes=90))]
    metrics = {metric.name: metric for metric in all_metrics(Measured(views), is_active=True, folders={})}
    [sample] = metrics["sage_training_memory_estimate_error_ratio"].samples
    assert sample.value == pytest.approx(-0.1)
