"""One step of an export: check an adapter, or write a model as safetensors."""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sage.common.errors import ModelError
from sage.libs.models.adapters import attach_adapter, merged
from sage.libs.models.chat import ChatFormat, Message, ensure_chat_template
from sage.libs.models.export.modelfile import modelfile
from sage.libs.models.export.steps import finish_step
from sage.libs.models.loading import load_causal_lm, load_tokenizer, local_folder, model_config, tokenizer_folder
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model

logger = logging.getLogger(__name__)
#: Patterns of the licence files that are copied from the base model's folder to the export.
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
#: Chats whose prompts must have the same tokens in each export format.
_PROBES: list[list[Message]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 × 1234567?\n\n  – né, 日本 🦊\t"}],
    [
        {"role": "user", "content": "def f(x):\n    return x**2  # I'm sure"},
        {"role": "assistant", "content": "It's f(2) == 4."},
        {"role": "user", "content": "why?"},
    ],
]


#: Settings in a model's generation config that are used as default settings of requests.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_adapter(name: str) -> None:
    """Load the base model of an adapter, and attach the adapter with PEFT. Raises ModelError on failure."""
    source, base = _located(name)
    attach_adapter(load_causal_lm(base, _own_dtype(base)), source.folder)


def write_dense(name: str, folder: Path, *, fp32: bool, with_modelfile: bool) -> dict[str, Any]:
    """Write a model as safetensors, with tokenizer, chat template and end tokens.

    If the model is an adapter, the adapter is merged into its base model in fp32 before the result is written.
    fp32: whether to write the result in fp32 instead of the dtype of the base model.
    Returns the dict from `_described` with the additional key `modelfile` (None if `with_modelfile` is False).
    Raises ModelError, for example if the adapter cannot be merged.
    """
    source, base = _located(name)
    is_adapter = source.kind is ModelKind.ADAPTER
    own = _own_dtype(base)
    model: Any = load_causal_lm(base, torch.float32 if is_adapter or fp32 else own)
    if is_adapter:
        model = merged(attach_adapter(model, source.folder))
        if isinstance(model, PeftModel):
            raise _not_merged(name, model.peft_type.value)
    tokenizer: Any = load_tokenizer(tokenizer_folder(source, base))
    if warning := ensure_chat_template(tokenizer):
        logger.warning("%s", warning)
    settings = model.generation_config
    settings.eos_token_id = ChatFormat(tokenizer).end_ids(settings.eos_token_id)
    if settings.temperature is not None or settings.top_p is not None or settings.top_k is not None:
        settings.do_sample = True  # otherwise transformers refuses to save sampling settings
    model.to(torch.float32 if fp32 else own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for pattern in _LICENCES:
        for file in base.glob(pattern):
            shutil.copy(file, folder)
    facts = _described(model, ChatFormat(load_tokenizer(folder)))
    return {**facts, "modelfile": _modelfile(folder, facts) if with_modelfile else None}


def _described(model: Any, chat_format: ChatFormat) -> dict[str, Any]:
    probes: list[dict[str, Any]] = []
    for messages in _PROBES:
        try:
            probes.append({"messages": messages, "tokens": chat_format.prompt_ids(messages)})
        except Exception as error:  # noqa: BLE001 - templates raise all kinds of exceptions for unsupported roles
            logger.info("the chat template rejects one of the test chats: %s", error)
    bos, settings = chat_format.tokenizer.bos_token_id, model.generation_config
    return {
        "probes": probes,
        "end_tokens": list(settings.eos_token_id),
        "begins_with_bos": bos is not None and all(probe["tokens"][0] == bos for probe in probes),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sampling": {name: value for name in _SAMPLING if (value := getattr(settings, name, None)) is not None},
        "context_tokens": int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096)),
    }


def _modelfile(folder: Path, facts: dict[str, Any]) -> str:
    chat_format = ChatFormat(load_tokenizer(folder))
    adds_bos = facts["begins_with_bos"] and chat_format.prefix == [chat_format.tokenizer.bos_token_id]
    return modelfile(chat_format, facts["end_tokens"], adds_bos=adds_bos)


def _located(name: str) -> tuple[ModelSource, Path]:
    source = resolve_model(name)
    if source.kind is ModelKind.ADAPTER and source.base and source.base.kind is ModelKind.ADAPTER:
        raise ModelError(
            code="base_is_adapter",
            message=f"The base of {name} is itself an adapter.",
            hint="Export the base with `--format merged`, and use the merged model as the base of this adapter.",
        )
    return source, local_folder(source.base or source)


def _not_merged(name: str, kind: str) -> ModelError:
    return ModelError(
        code="export_unsupported",
        message=f"{name} is an adapter of the type {kind}. This type cannot be merged into a base model.",
        hint="Use `--format adapter`.",
        param="format",
    )


def _own_dtype(base: Path) -> torch.dtype:
    found = model_config(base).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def main() -> None:
    """Write the model if the option --folder is given; otherwise check the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, help="Folder to write the model to; if omitted, the adapter is only checked.")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--modelfile", action="store_true")
    given = parser.parse_args()
    if given.folder:
        finish_step(lambda: write_dense(given.model, given.folder, fp32=given.fp32, with_modelfile=given.modelfile))
    finish_step(lambda: check_adapter(given.model))


if __name__ == "__main__":
    main()
