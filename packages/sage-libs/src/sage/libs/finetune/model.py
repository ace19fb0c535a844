"""The model that is trained: a frozen base with PEFT's adapters."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from sage.common.errors import ConfigError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.models.loading import load_causal_lm


@dataclass(frozen=True)
class Precision:
    """In which numbers a run computes, and why."""

    bf16: bool  #: base and matrix products in bf16; the adapters stay fp32
    base_8bit: bool
    reason: str


def choose_precision(config: FinetuneConfig) -> Precision:
    """Return the numbers that this machine computes best in, as far as the run leaves the choice."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported()
        base_8bit = config.use_8bit and importlib.util.find_spec("bitsandbytes") is not None
        why_8bit = "8-bit base (bitsandbytes)" if base_8bit else "base not in 8 bits: bitsandbytes is not installed"
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        base_8bit, why_8bit = False, "base not in 8 bits: bitsandbytes' 8-bit layers need CUDA"
    bf16 = has_bf16 if config.precision == "auto" else config.precision == "bf16"
    why = "asked for" if config.precision != "auto" else f"the device {'has' if has_bf16 else 'lacks'} bf16 instructions"
    return Precision(
        bf16, base_8bit, f"{'bf16' if bf16 else 'fp32'}: {why}; {why_8bit if config.use_8bit else 'whole base'}"
    )


def load_trainable(folder: Path, config: FinetuneConfig, precision: Precision) -> PeftModel:
    """Return the base of a folder with fresh adapters in fp32, which alone are trained.

    Raises ModelError where the base does not load, ConfigError where the target modules are not in it.
    """
    options: dict[str, Any] = {}
    if precision.base_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    base = load_causal_lm(folder, torch.bfloat16 if precision.bf16 else torch.float32, **options)
    base.config.use_cache = False
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise ConfigError(
            code="target_modules_unknown",
            message=f"target_modules={config.target_modules!r} does not fit the model: {error}",
            hint="'all-linear' fits every model.",
            param="target_modules",
        ) from error
    assert isinstance(model, PeftModel)
    return model
