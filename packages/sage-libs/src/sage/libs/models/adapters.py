"""Attach an adapter to its base model, and merge an adapter into its base model."""

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sage.common.errors import ModelError, first_line
from sage.common.files import replace_file
from sage.common.paths import get_user_paths, private_folder
from sage.libs.models.fingerprint import fingerprint
from sage.libs.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)


def attach_adapter(base: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Attach the adapter in a folder to a base model. If the adapter was trained on another base model, log a warning.

    Raises ModelError if the adapter does not fit the base model, for example because a weight is missing. ModelError
    is also raised if `is_trainable` is False and a weight is not finite.
    """
    _warn_of_another_base(base, folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if getattr(config, "megatron_config", None):
            raise ValueError(
                "'megatron_config' is not supported, because PEFT would import the Python module that 'megatron_core' names"
            )
        config.inference_mode, base_name = not is_trainable, config.base_model_name_or_path
        model = get_peft_model(base, config)
        config.base_model_name_or_path = base_name  # get_peft_model has replaced the name by the local folder
        result = model.load_adapter(str(folder), model.active_adapter, is_trainable=is_trainable)
    except Exception as error:  # PEFT raises exceptions of any type for a broken config
        if is_out_of_memory(error):
            raise
        raise _unfit(folder, first_line(error)) from error
    if result.unexpected_keys and not config.is_prompt_learning:  # PEFT lists virtual tokens as unexpected keys
        raise _unfit(folder, f"the base model has no layer for the adapter's weight {result.unexpected_keys[0]}")
    if result.missing_keys:
        raise _unfit(folder, f"the adapter does not contain the weight {result.missing_keys[0]}")
    assert isinstance(model, PeftModel)
    if not is_trainable:
        _check_finite(folder)
    return model


def read_lora(base: PreTrainedModel, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weights (A, B) of a plain LoRA adapter. Keys: names of linear layers. The base model is not changed.

    A: (rank, in_features).  B: (rank, out_features), scaled.  For an input x, the adapter adds x @ A.T @ B to the output.
    Raises ModelError if the adapter does not fit the base model, or if a weight is not finite.
    """
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    attached = attach_adapter(copy.deepcopy(base, shared), folder)
    weights = {}
    for name, layer in attached.get_base_model().named_modules():
        if isinstance(layer, Linear):
            adapter = attached.active_adapter
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scaled = (up.detach().float() * layer.scaling[adapter]).T.contiguous()
            weights[name] = down.detach().to(base.dtype), scaled.to(base.dtype)
    return weights


def merged(model: PeftModel) -> Any:
    """Merge the adapter into the base model, and return the base model. If merging is not supported, return `model`.

    Merging changes weights in place. If the adapter changes lm_head or the embedding, tied weights are untied first.
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        return model
    _untie_head(model.get_base_model())
    return model.merge_and_unload()


def _check_finite(folder: Path) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
            if not file.get_tensor(name).isfinite().all():
                raise _not_finite(folder, name)


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
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def _warn_of_another_base(base: PreTrainedModel, folder: Path) -> None:
    found = fingerprint(Path(base.name_or_path))
    if _trained_base(folder, found) != found:
        logger.warning(
            "The adapter in %s was trained on a base model other than %s, so answers with the adapter are possibly wrong.",
            folder, base.name_or_path,
        )  # fmt: skip


def _trained_base(folder: Path, found: str) -> str:
    """Return the fingerprint of the base model that an adapter was trained on.

    The fingerprint is read from sage_run.json. If this file contains no fingerprint, SAGE assumes that the adapter was
    trained on the base model with which SAGE first used the adapter.
    found: fingerprint of the base model that is used now.
    """
    try:
        expected = json.loads((folder / "sage_run.json").read_text(encoding="utf-8")).get("base_sha256")
        if isinstance(expected, str):
            return expected
    except (OSError, ValueError, AttributeError):
        pass  # the adapter was trained by another tool or an earlier version of SAGE
    try:
        weights = (folder / "adapter_model.safetensors").stat()
        key = hashlib.sha256(f"{folder.resolve()} {weights.st_size} {weights.st_mtime_ns}".encode()).hexdigest()
        seen = get_user_paths().cache_dir / "adapter_bases" / key
        if not seen.is_file():
            replace_file(private_folder(seen.parent) / key, found.encode())
        return seen.read_text(encoding="utf-8")
    except OSError as error:
        logger.info("the fingerprint of the base model of the adapter in %s cannot be saved: %s", folder, error)
        return found


def _not_finite(folder: Path, name: str) -> ModelError:
    return ModelError(
        code="adapter_not_finite",
        message=f"The weight {name} of the adapter in {folder} contains values that are not finite numbers.",
        hint="The training of the adapter diverged. Use an earlier checkpoint, or train again with a lower learning rate.",
        param="model",
    )


def _unfit(folder: Path, problem: str) -> ModelError:
    return ModelError(
        code="adapter_unfit",
        message=f"The adapter in {folder} does not fit its base model: {problem}.",
        hint="'base_model_name_or_path' in adapter_config.json must name the model that the adapter was trained on.",
        param="model",
    )
