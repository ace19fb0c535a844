"""Decide whether a running server can load an adapter. This module does not read weights or import torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage.libs.models.resolve import json_object, safetensors_header

#: Supported entries of adapter_config.json. All other entries, except `bias`, must be null, false, empty or 0.
_PLAIN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
})  # fmt: skip
#: Values of init_lora_weights that do not change the base model. Other values, such as "pissa", change the base model.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA_WEIGHT = re.compile(r".*\.lora_[AB]\.weight")
_HEAD = re.compile(r".*\.(lm_head|embed_out|output_projection)\.lora_[AB]\.weight")


def why_not_hot(folder: Path, base_folder: Path) -> str | None:
    """Return the reason why a running server of the base model cannot load an adapter; None if the server can.

    Raises ModelError for unreadable files.
    """
    config = json_object(folder / "adapter_config.json")
    return (
        _config_problem(config)
        or _weights_problem(safetensors_header(folder / "adapter_model.safetensors"))
        or _base_problem(config, base_folder)
    )


def _config_problem(config: Mapping[str, Any]) -> str | None:
    if config.get("peft_type") != "LORA":
        return f"the adapter's type is {config.get('peft_type')}, not LORA"
    if config.get("bias") not in (None, "none"):
        return f"the adapter trains biases ({config['bias']})"
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        return f"the adapter's initialization ({config['init_lora_weights']}) changes the base model"
    others = sorted(name for name, value in config.items() if value and name not in {*_PLAIN, "bias"})
    return f"the adapter uses {others[0]}" if others else None


def _weights_problem(header: Mapping[str, Any]) -> str | None:
    for name in sorted(header):
        if not _LORA_WEIGHT.fullmatch(name):
            return f"the adapter has the weight {name}, which is not a LoRA weight of a linear layer"
        if _HEAD.fullmatch(name):
            return "the adapter changes the output head"
    return None


def _base_problem(config: Mapping[str, Any], base_folder: Path) -> str | None:
    """Return a problem if the adapter's base is itself an adapter. Then, both adapters must be merged into one model."""
    is_adapter = (base_folder / "adapter_config.json").is_file()
    return f"the adapter's base {config.get('base_model_name_or_path')} is an adapter too" if is_adapter else None
