import json
import math
from pathlib import Path

import pytest

from sage.common.errors import RunError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.run.estimate import Estimate, check_memory, estimate
from sage.libs.finetune.training.memory import available_bytes

#: A vocabulary of 100, and two layers with hidden size 8, each with a matrix from 8 to 24 and one from 24 to 8.
SHAPES = {
    "model.embed_tokens.weight": [100, 8],
    "model.norm.weight": [8],
    **{f"model.layers.{i}.mlp.up_proj.weight": [24, 8] for i in range(2)},
    **{f"model.layers.{i}.mlp.down_proj.weight": [8, 24] for i in range(2)},
}
ENDS = 4 * 32  #: inputs and outputs of the layers' matrices


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write the headers of a model in two files, without weights."""
    for part in ("embed_tokens", "layers"):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in SHAPES.items():
            if (part == "layers") == ("layers" in name):
                entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
                header[name] = entry  # type: ignore[assignment]
        text = json.dumps(header).encode()
        (tmp_path / f"{part}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return tmp_path


def needs(
    model: Path, *, bf16: bool = False, base_bits: int | None = None, int8: bool = False, **options: object
) -> Estimate:
    values = {"base_model": str(model), "dataset_path": "d.jsonl", "output_dir": "out", "lora_rank": 2, **options}
    return estimate(model, FinetuneConfig.model_validate(values), bf16=bf16, base_bits=base_bits, int8=int8)


def test_the_memory_of_a_run_is_estimated_from_the_headers_of_the_weights(model: Path) -> None:
    whole = needs(model)
    assert whole.base_bytes == 4 * (100 * 8 + 8 + 4 * 24 * 8)
    assert whole.trained_bytes == 16 * 2 * ENDS
    assert whole.token_bytes == 4 * ENDS
    assert whole.total_bytes(1000) - whole.total_bytes(900) == 100 * whole.token_bytes
    half = needs(model, bf16=True)
    assert (half.base_bytes, half.token_bytes) == (whole.base_bytes // 2, whole.token_bytes // 2)
    assert half.base_bytes - needs(model, bf16=True, base_bits=4).base_bytes == pytest.approx(4 * 24 * 8 * 1.48, abs=1)
    ours = needs(model, int8=True)
    assert whole.base_bytes - ours.base_bytes == pytest.approx(4 * 24 * 8 * 2.99, abs=1)
    assert whole.total_bytes(1000) - ours.total_bytes(1000) == whole.base_bytes - ours.base_bytes
    small = needs(model, int8=True, lora_rank=1)
    assert small.total_bytes(0) == small.least_bytes == whole.base_bytes  # while it is loaded
    full = needs(model, finetuning_type="full", lora_rank=8)
    assert full.least_bytes == 16 * (100 * 8 + 8 + 4 * 24 * 8)


def test_the_message_for_a_micro_batch_that_does_not_fit_names_the_size_that_fits(model: Path) -> None:
    run = needs(model)
    room_bytes = run.total_bytes(5000)
    assert run.fitting_tokens(room_bytes) == 5000
    assert "fit" not in run.describe(5000, room_bytes)
    assert "about 5,000 tokens at once; larger micro-batches (up to 6,000 tokens)" in run.describe(6000, room_bytes)
    assert run.fitting_tokens(run.base_bytes) == 0


@pytest.mark.parametrize(
    ("options", "way"),
    [({}, "--quantization 4bit"), ({"finetuning_type": "full", "lora_rank": 8}, "train an adapter"),
     ({"quantization": "4bit"}, "use a smaller model")],
)  # fmt: skip
def test_a_model_that_does_not_fit_into_memory_is_rejected(model: Path, options: dict[str, object], way: str) -> None:
    run = needs(model, **options)
    config = FinetuneConfig.model_validate(
        {"base_model": str(model), "dataset_path": "d.jsonl", "output_dir": "out", **options}
    )
    check_memory(run, run.least_bytes, config)
    with pytest.raises(RunError, match=r"need 0\.0 GB of memory") as caught:
        check_memory(run, run.least_bytes - 1, config)
    assert way in str(caught.value.hint)


def test_the_available_memory_is_above_zero() -> None:
    assert 2**20 < available_bytes() < 2**50
