"""Loading weights and tokenizers, always from a local folder, never a pickle, never with remote code."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sage.common.errors import ModelError
from sage.common.paths import get_user_paths
from sage.common.processes import held_lock
from sage.libs.models.resolve import ModelKind, ModelSource

logger = logging.getLogger(__name__)
#: What a model needs to be loaded; everything else on the hub stays there.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def local_folder(source: ModelSource) -> Path:
    """Return a folder that transformers and PEFT load as it stands, making it first where it must be made.

    A GGUF file is converted once to bf16 safetensors in the user's models folder; a hub model is downloaded there.
    """
    if source.kind in (ModelKind.FULL, ModelKind.ADAPTER):
        return source.folder
    models_dir = get_user_paths().models_dir
    is_named = source.kind is ModelKind.HUB or not Path(source.name).is_absolute()
    target = models_dir / (source.name if is_named else f"{source.folder.name}-safetensors")
    with held_lock(models_dir / ".locks" / f"{target.name}.lock"):
        if not (target / "config.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            (_download if source.kind is ModelKind.HUB else _convert_gguf)(source, partial)
            os.replace(partial, target)
    return target


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model's folder; raises ModelError where it has none or a slow one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            code="tokenizer_missing", message=f"{folder} has no tokenizer that loads: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(code="tokenizer_slow", message=f"{folder} has no fast tokenizer (tokenizer.json).")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Return the causal language model of a folder of safetensors; raises ModelError where that fails."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            code="model_invalid", message=f"The model in {folder} does not load: {_first_line(error)}"
        ) from error


def _convert_gguf(source: ModelSource, target: Path) -> None:
    gguf = next(source.folder.glob("*.gguf"))
    logger.info("converting %s to safetensors, once", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dense now; what remembers the packed ones would stop save_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _download(source: ModelSource, target: Path) -> None:
    from huggingface_hub import snapshot_download

    logger.info("downloading %s from the hub", source.name)
    snapshot_download(source.name, local_dir=target, allow_patterns=_HUB_FILES)
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
