"""The model that is trained: a frozen base with PEFT's adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from sage.common.errors import ConfigError, ModelError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.precision import Precision
from sage.libs.models.loading import load_causal_lm


def load_trainable(folder: Path, config: FinetuneConfig, precision: Precision, adapter: Path | None = None) -> PeftModel:
    """Return the base of a folder with adapters in fp32, which alone are trained: fresh ones, or those of another folder.

    Raises ModelError where base or adapter does not load, ConfigError where the target modules are not in the base.
    """
    options: dict[str, Any] = {}
    if precision.base_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    base = load_causal_lm(folder, torch.bfloat16 if precision.bf16 else torch.float32, **options)
    base.config.use_cache = False
    model = _with_fresh_adapter(base, config) if adapter is None else _with_adapter(base, adapter)
    assert isinstance(model, PeftModel)
    return model


def _with_adapter(base: PreTrainedModel, adapter: Path) -> Any:
    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        problem = (str(error).splitlines() or ["it is not whole"])[0]
        raise ModelError(code="model_invalid", message=f"The adapter in {adapter} does not load: {problem}") from error


def _with_fresh_adapter(base: PreTrainedModel, config: FinetuneConfig) -> Any:
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, lora)
    except ValueError as error:
        raise ConfigError(
            code="target_modules_unknown",
            message=f"target_modules={config.target_modules!r} does not fit the model: {error}",
            hint="'all-linear' fits every model.",
            param="target_modules",
        ) from error
