"""Load and save the model to train: a frozen base with a PEFT adapter, or a model with all weights trainable."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from sage.common.errors import ConfigError
from sage.libs.finetune.config import FinetuneConfig
from sage.libs.finetune.training.precision import Precision
from sage.libs.models.adapters import attach_adapter
from sage.libs.models.loading import load_causal_lm, model_config

#: PeftModel if only adapters are trained, PreTrainedModel for full fine-tuning.
Trainable: TypeAlias = PeftModel | PreTrainedModel


def load_trainable(folder: Path, config: FinetuneConfig, precision: Precision, adapter: Path | None = None) -> Trainable:
    """Load the base model in `folder`, and add an fp32 adapter to train.

    adapter: folder of an existing adapter to train further; None: add a new adapter.
    For full fine-tuning, no adapter is added, and the model is loaded in fp32 with all weights trainable.
    Raises ModelError if base or adapter cannot be loaded, and ConfigError if no module of the base matches `target_modules`.
    """
    is_full = config.finetuning_type == "full"
    dtype = torch.bfloat16 if precision.bf16 and not is_full else torch.float32
    # Load the base directly onto its device, because the kernels combine the weights into matrices that must not be moved.
    place = {"device_map": {"": PartialState().device}} if torch.cuda.is_available() else {}
    base = load_causal_lm(folder, dtype, **place, **_quantised(precision, dtype))
    base.config.use_cache = False
    if not torch.cuda.is_available():
        # Copy the weights out of the memory-mapped file. While any weight refers to this file, the whole file counts as
        # memory of this process.
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
        # Prevent bitsandbytes from repacking 4-bit weights for evaluation, because the repacking is not undone for training.
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if is_full:
        return base
    model = _with_fresh_adapter(base, config) if adapter is None else attach_adapter(base, adapter, is_trainable=True)
    assert isinstance(model, PeftModel)
    return model


def loraplus_optimizer(
    model: Trainable, lr_ratio: float | None, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer | None:
    """Return the LoRA+ optimizer, or None if `lr_ratio` is None.

    lr_ratio: learning rate of the matrices B, divided by the learning rate of the matrices A.
    """
    if lr_ratio is None:
        return None
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=learning_rate, loraplus_lr_ratio=lr_ratio, loraplus_weight_decay=weight_decay
    )


def width_of(folder: Path) -> int:
    """Return the hidden size of the model in a folder, or 768 if the config has no hidden size. Raises ModelError."""
    return int(getattr(model_config(folder), "hidden_size", 768))


def decoder(model: Trainable) -> PreTrainedModel:
    """Return the transformers model: for a PeftModel, the model inside the wrapper."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def load_weights(model: Trainable, checkpoint: Path) -> None:
    """Replace the trained weights by the weights in a checkpoint."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        return
    for file in checkpoint.glob("model*.safetensors"):
        model.load_state_dict(load_file(file), strict=False)  # not strict, because one file need not contain all weights


def save_model(model: Trainable, folder: Path, source: Path) -> None:
    """Write the adapter to `folder`; after full fine-tuning, write the whole model in the dtype of the model in `source`."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[model.active_adapter])
        return
    model.to(AutoConfig.from_pretrained(source, local_files_only=True).dtype or torch.float32)
    model.config.use_cache = True
    model.save_pretrained(folder)


def _quantised(precision: Precision, dtype: torch.dtype) -> dict[str, Any]:
    match precision.base_bits:
        case 8:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        case 4:
            # Dettmers et al. 2023, "QLoRA": NF4 with double quantization.
            four = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            return {"quantization_config": four}
        case _:
            return {}


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
            message=f"target_modules={config.target_modules!r} does not match the model: {error}",
            hint="The value 'all-linear' works with every model.",
            param="target_modules",
        ) from error
