"""Prepare models for loading: convert GGUF files to safetensors, and download models from the hub."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sage.common.errors import ModelError, SageError, first_line
from sage.common.files import fsync_path, fsync_tree
from sage.common.paths import get_user_paths
from sage.common.processes import held_lock
from sage.libs.models.originals import FOLDER, known, remember
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model

logger = logging.getLogger(__name__)
#: Files that are needed to load a model; other files are not downloaded.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_HASH_DIGITS = 16


def converted(folder: Path) -> Path:
    """Convert the GGUF file in `folder` to bf16 safetensors, unless it was converted before. Return the result's folder."""
    gguf = next(folder.glob("*.gguf"))
    root = get_user_paths().models_dir / FOLDER
    with _reported(f"{gguf} cannot be converted to safetensors", root):
        with held_lock(root / ".lock"):
            target = known(root, gguf)
            if target is None:
                with gguf.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_DIGITS]
                target = root / f"{gguf.stem}-{digest}"
                remember(target, gguf)
        with held_lock(root / f".{target.name}.lock"):
            if not (target / "config.json").is_file():
                logger.info("converting %s to safetensors; this is done only once", gguf)
                shutil.rmtree(target, ignore_errors=True)
                _make(target, lambda aside: _convert(gguf, aside))
    return target


def downloaded(source: ModelSource) -> Path:
    """Return the folder of a hub model; download the model if the folder does not exist."""
    target, locks = source.folder, get_user_paths().models_dir / ".locks"
    with (
        _reported(f"{source.name} cannot be downloaded", target.parent),
        held_lock(locks / f"{source.name.replace('/', '--')}.lock"),
    ):
        if not (target / "config.json").is_file():
            logger.info("downloading %s from the Hugging Face Hub", source.name)
            _make(target, lambda aside: _download(source.name, aside))
    return target


def with_downloads(source: ModelSource) -> ModelSource:
    """Download a model and its base model from the hub if needed. Return the model's location. Raises ModelError."""
    missing = [part for part in (source, source.base) if part and part.kind is ModelKind.HUB]
    for part in missing:
        downloaded(part)
    return resolve_model(source.name) if missing else source


def _make(target: Path, write: Callable[[Path], None]) -> None:
    """Create the folder `target` atomically; the caller must hold the lock of the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # files of a killed process
    try:
        write(aside)
        fsync_tree(aside)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_path(target.parent)


@contextlib.contextmanager
def _reported(failure: str, place: Path) -> Iterator[None]:
    """Convert exceptions in the `with` block, except SageError, to ModelError. Libraries raise exceptions of many types.

    failure: beginning of the message.  place: folder that is written, for the hint about a full disk.
    """
    try:
        yield
    except SageError:
        raise
    except Exception as error:
        raise ModelError(
            code="model_unusable",
            message=f"{failure}: {first_line(error)}.",
            hint=f"Free some space on the disk of {place}, where the model is written." if "space" in str(error) else "",
            param="model",
        ) from error


def _convert(gguf: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # transformers' advice about memory does not apply here
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, trust_remote_code=False
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    # The loaded weights are not quantized. If the quantization config stayed, save_pretrained would reject the model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _download(name: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(name, local_dir=target, allow_patterns=_HUB_FILES)
    shutil.rmtree(target / ".cache", ignore_errors=True)
