"""Load weights and tokenizers from local folders. Pickles and code from models are never executed."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sage.common.errors import ModelError, first_line
from sage.libs.models.conversion import converted, downloaded
from sage.libs.models.memory import is_out_of_memory
from sage.libs.models.resolve import ModelKind, ModelSource

_MOST_NAMED = 5


def local_folder(source: ModelSource) -> Path:
    """Return a local folder that transformers and PEFT can load.

    A GGUF file is first converted to bf16 safetensors, and a hub model is downloaded. The converted or downloaded files are
    stored in the models folder.
    Raises ModelError if the conversion or the download fails.
    """
    if source.kind is ModelKind.GGUF:
        return converted(source.folder)
    return downloaded(source) if source.kind is ModelKind.HUB else source.folder


def tokenizer_folder(source: ModelSource, base: Path) -> Path:
    """Return the folder with a model's tokenizer. This is `base`, unless the model is an adapter with its own tokenizer."""
    is_own = source.kind is ModelKind.ADAPTER and (source.folder / "tokenizer.json").is_file()
    return source.folder if is_own else base


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder; raises ModelError if the tokenizer is missing, invalid, or not fast."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files cause exceptions of any type
        raise ModelError(
            code="tokenizer_missing",
            message=f"The tokenizer in {folder} is missing or cannot be loaded: {first_line(error)}.",
            param="model",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(code="tokenizer_slow", message=f"{folder} has no fast tokenizer (tokenizer.json).", param="model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ModelError if the tokenizer can produce a token that has no embedding in the model.

    Unused special tokens need no embedding, for example the image token of Gemma 3. A special token counts as used if
    it is BOS, EOS or padding, or if the chat template contains it.  folder: folder of the model.
    """
    rows = embedding_rows(folder)
    special = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    template = str(tokenizer.chat_template or "")
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    used = [
        f"{token!r} ({number})" for number, token in beyond if token not in special or token in ends or token in template
    ]
    if used:
        named = ", ".join(used[:_MOST_NAMED]) + (f" and {len(used) - _MOST_NAMED} more" if len(used) > _MOST_NAMED else "")
        raise ModelError(
            code="tokenizer_too_large",
            message=f"The tokenizer has tokens for which the model in {folder} has no embedding (its embedding has "
            f"{rows:,} rows): {named}.",
            hint="Use the model's own tokenizer, or resize the model's embedding.",
            param="base_model",
        )


def embedding_rows(folder: Path) -> int:
    """Return the number of rows of a model's embedding; raises ModelError if the config cannot be loaded."""
    return int(model_config(folder).vocab_size)


def model_config(folder: Path) -> Any:
    """Return the config of the text model in a folder; raises ModelError if the config cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        if not isinstance(config.vocab_size, int):
            raise TypeError(f"vocab_size is {config.vocab_size!r}")
    except Exception as error:
        raise _invalid(folder, f"has a config.json that cannot be loaded: {first_line(error)}") from error
    return config


def load_causal_lm(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load a causal language model from safetensors; raises ModelError if weights are missing or damaged."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _invalid(folder, f"cannot be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # transformers has initialized these weights randomly
        raise _invalid(folder, f"has no weights for {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
    return model


def _invalid(folder: Path, problem: str) -> ModelError:
    return ModelError(code="model_invalid", message=f"The model in {folder} {problem}.", param="model")
