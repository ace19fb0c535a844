"""Adapters: put on the base that they were trained on, and merged into it so that it computes the same."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from sage.common.errors import ModelError, first_line
from sage.common.files import replace_file
from sage.common.paths import get_user_paths, private_folder
from sage.libs.models.fingerprint import fingerprint

logger = logging.getLogger(__name__)


def attach_adapter(base: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Return a base with the adapter of a folder; warns if the base is known to be another one than it was trained on.

    Raises ModelError if the adapter does not fit the base: other shapes, weights without a place, places without weights.
    """
    _warn_of_another_base(base, folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if getattr(config, "megatron_config", None):
            raise ValueError("megatron_config names a module to import, which is not supported")
        config.inference_mode, base_name = not is_trainable, config.base_model_name_or_path
        model = get_peft_model(base, config)
        config.base_model_name_or_path = base_name  # as the adapter has it, not the folder that it is in here
        result = model.load_adapter(str(folder), model.active_adapter, is_trainable=is_trainable)
    except Exception as error:  # PEFT raises what it likes for a broken config
        raise _unfit(folder, first_line(error)) from error
    if result.unexpected_keys:
        raise _unfit(folder, f"the base has no place for its weight {result.unexpected_keys[0]}")
    if result.missing_keys:
        raise _unfit(folder, f"it has no weight for {result.missing_keys[0]}")
    assert isinstance(model, PeftModel)
    return model


def merged(model: PeftModel) -> Any:
    """Return the base with its adapter merged into it; as it is if its kind of adapter cannot be merged.

    A head that shares its weight with the embeddings gets one of its own first if the adapter touches one of them: merging
    changes weights in place, and would change both.
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        return model
    _untie_head(model.get_base_model())
    return model.merge_and_unload()


def _untie_head(base: PreTrainedModel) -> None:
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None:
        return
    plain_head, plain_embeddings = _without_adapter(head), _without_adapter(embeddings)
    is_untouched = plain_head is head and plain_embeddings is embeddings
    if is_untouched or plain_head.weight.data_ptr() != plain_embeddings.weight.data_ptr():
        return
    plain_head.weight = nn.Parameter(plain_head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _without_adapter(module: Any) -> Any:
    """Return the layer inside PEFT's wrappers."""
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def _warn_of_another_base(base: PreTrainedModel, folder: Path) -> None:
    found = fingerprint(Path(base.name_or_path))
    if _trained_base(folder, found) != found:
        logger.warning(
            "The base model in %s is not the one that the adapter in %s was trained on: its answers may be wrong.",
            base.name_or_path, folder,
        )  # fmt: skip


def _trained_base(folder: Path, found: str) -> str:
    """Return the fingerprint of the base that an adapter was trained on; if it is not ours, that of the first base found."""
    try:
        expected = json.loads((folder / "sage_run.json").read_text(encoding="utf-8")).get("base_sha256")
        if isinstance(expected, str):
            return expected
    except (OSError, ValueError, AttributeError):
        pass  # not ours, or of an earlier version
    try:
        weights = (folder / "adapter_model.safetensors").stat()
        key = hashlib.sha256(f"{folder.resolve()} {weights.st_size} {weights.st_mtime_ns}".encode()).hexdigest()
        seen = get_user_paths().cache_dir / "adapter_bases" / key
        if not seen.is_file():
            replace_file(private_folder(seen.parent) / key, found.encode())
        return seen.read_text(encoding="utf-8")
    except OSError as error:
        logger.info("the base of %s cannot be remembered: %s", folder, error)
        return found


def _unfit(folder: Path, problem: str) -> ModelError:
    return ModelError(
        code="adapter_unfit",
        message=f"The adapter in {folder} does not fit its base model: {problem}.",
        hint="adapter_config.json names the base ('base_model_name_or_path'); it must be the model that was trained on.",
        param="model",
    )
