"""The files of an adapter show whether a running base can load the adapter. This check needs no torch."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from sage.common.errors import ModelError
from sage.libs.models.hot import why_not_hot

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
#: Some of the fields that PEFT writes for plain LoRA.
PLAIN = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/base", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj"], "bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": True,
    "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "inference_mode": True,
}  # fmt: skip


def adapter_of(folder: Path, config: dict[str, Any], names: tuple[str, ...]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.mark.parametrize(
    ("config", "names", "reason"),
    [
        ({}, (), None),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, (), None),
        ({"layers_to_transform": [0], "init_lora_weights": "gaussian", "lora_dropout": 0.1}, (), None),
        ({"peft_type": "IA3"}, (), "IA3"),
        ({"use_dora": True}, (), "use_dora"),
        ({"modules_to_save": ["lm_head"]}, (), "modules_to_save"),
        ({"trainable_token_indices": [1]}, (), "trainable_token_indices"),
        ({"bias": "all"}, (), "biases"),
        ({"lora_bias": True}, (), "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, (), "pissa"),
        ({"fan_in_fan_out": True}, (), "fan_in_fan_out"),
        ({"a_field_of_the_future": {"x": 1}}, (), "a_field_of_the_future"),
        ({}, ("base_model.model.model.embed_tokens.weight",), "embed_tokens"),
        ({}, ("base_model.model.model.embed_tokens.lora_embedding_A",), "lora_embedding_A"),
        ({}, (f"{LAYER}.lora_magnitude_vector",), "lora_magnitude_vector"),
        ({}, ("base_model.model.lm_head.lora_A.weight",), "output head"),
    ],
    ids=str,
)
def test_a_running_base_can_load_only_plain_lora_of_linear_layers(
    tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], reason: str | None
) -> None:
    folder = adapter_of(tmp_path / "adapter", config, (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", *names))
    found = why_not_hot(folder, tmp_path)
    assert found is None if reason is None else reason in str(found)


def test_a_running_base_cannot_load_an_adapter_that_was_trained_on_an_adapter(tmp_path: Path) -> None:
    base = adapter_of(tmp_path / "base", {}, ())
    assert "is an adapter" in str(why_not_hot(adapter_of(tmp_path / "adapter", {}, ()), base))


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_configuration_is_an_error(tmp_path: Path, content: str) -> None:
    folder = adapter_of(tmp_path / "adapter", {}, ())
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match="is not"):
        why_not_hot(folder, tmp_path)
