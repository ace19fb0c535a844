"""Decide whether a model can be used for embeddings. This module does not read weights or import torch."""

import json
from pathlib import Path
from typing import Any

from sage.common.errors import ModelError

#: Endings of the names of architectures that generate text.
_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def check_embeds(folder: Path) -> None:
    """Raise ModelError if a folder has a language model without settings of sentence-transformers.

    Without settings, sentence-transformers uses the mean of the tokens' vectors. Language models are not trained for
    this use.
    """
    config = folder / "config.json"
    if (folder / "modules.json").is_file() or not config.is_file():
        return
    values: Any = json.loads(config.read_bytes())
    architectures = values.get("architectures") if isinstance(values, dict) else None
    if any(str(name).endswith(_GENERATES) for name in architectures or ()):
        raise ModelError(
            code="model_invalid",
            message=f"{folder} has a language model without settings for embeddings. "
            "The library sentence-transformers needs these settings.",
            hint="To chat with the model, omit `--engine-kind embedding`. For embeddings, use a model trained for them.",
            param="model",
        )
