"""Load and run embedding models: folders in the format of sentence-transformers or of transformers."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sage.common.errors import ConfigError, ModelError, first_line
from sage.libs.models.embedding import check_embeds
from sage.libs.models.memory import is_out_of_memory
from sage.llm.workers import server
from sage.llm.workers.requests import EmbeddingRequest

logger = logging.getLogger(__name__)
#: A text is rejected without tokenization if it has more characters than the product of this number and the model's token
#: limit. In real texts, a token has far fewer characters.
_MAX_CHARACTERS_PER_TOKEN = 100
#: Text that is embedded to check a model.
_PROBE = "Which engine answers?"
#: Maximum difference that rounding can cause between two vectors of the same text.
_TOLERANCE = 1e-3


class Input(NamedTuple):
    """A checked input: token ids, or text if the model does not accept token ids."""

    given: str | list[int]
    tokens: int


class Embedder:
    """A loaded model with its tokenizer. One thread can call `read` while another thread calls `embed`."""

    def __init__(self, name: str) -> None:
        """Load the model, and check the model by embedding a text. Raises ModelError."""
        _, folder = server.load_source(name)
        self._model = _load(folder)
        self._tokenizer: Any = self._model.tokenizer
        limit = self._model.max_seq_length
        self._max_tokens: int | None = limit if isinstance(limit, int) else None  # static word vectors have the limit inf
        self._prompt: str = self._model.prompts.get(self._model.default_prompt_name) or ""
        try:
            expected = self._embed([_PROBE])
        except Exception as error:  # modules raise all kinds of exceptions
            if is_out_of_memory(error):
                raise
            raise _unusable(folder, f"cannot embed a text: {first_line(error)}") from error
        self.dimensions = expected.shape[1]
        self._takes_tokens = callable(self._tokenizer) and self._embeds_tokens_as(expected)

    def read(self, request: EmbeddingRequest) -> list[Input]:
        """Return the checked inputs of a request.

        Raises ConfigError if `dimensions` is too large, or if an input is invalid, for example empty or too long.
        """
        if request.dimensions and request.dimensions > self.dimensions:
            raise _invalid(
                f"dimensions is {request.dimensions}; this model's vectors have only {self.dimensions} components.",
                "dimensions",
            )
        return [self._read(f"input {index}", given) for index, given in enumerate(request.input)]

    def embed(self, inputs: list[Input]) -> Tensor:
        """Return the vectors as an fp32 tensor of shape (inputs, dimensions) on the CPU."""
        return self._embed([each.given for each in inputs])

    def _read(self, place: str, given: str | list[int]) -> Input:
        if not given:
            raise _invalid(f"{place} is empty.", "input")
        if isinstance(given, list):
            if not self._takes_tokens:
                raise _invalid(f"{place}: this model takes text, not token ids.", "input")
            if max(given) >= (known := self._vocabulary_size()):
                raise _invalid(f"{place}: token id {max(given)} does not exist; the model has {known} tokens.", "input")
            read = Input(given, len(given))
        elif self._max_tokens and len(given) > self._max_tokens * _MAX_CHARACTERS_PER_TOKEN:
            raise self._too_long(f"{place} has {len(given)} characters")
        else:
            ids = self._ids(given)
            read = Input(ids if self._takes_tokens else given, len(ids))
        if self._max_tokens and read.tokens > self._max_tokens:
            raise self._too_long(f"{place} has {read.tokens} tokens")
        if not read.tokens:
            raise _invalid(f"{place} has no tokens.", "input")
        return read

    def _ids(self, text: str) -> list[int]:
        if callable(self._tokenizer):  # a tokenizer of transformers
            return list(self._tokenizer(self._prompt + text, truncation=False, verbose=False)["input_ids"])
        if hasattr(self._tokenizer, "encode"):  # a tokenizer of the package tokenizers
            return list(self._tokenizer.encode(self._prompt + text, add_special_tokens=False).ids)
        return list(self._tokenizer.tokenize(self._prompt + text))  # a word tokenizer

    def _vocabulary_size(self) -> int:
        return int(self._model.transformers_model.get_input_embeddings().num_embeddings)

    @torch.inference_mode()
    def _embed(self, inputs: list[Any]) -> Tensor:
        if isinstance(inputs[0], str):
            features = self._model.preprocess(inputs, prompt=self._prompt or None)
        else:
            rows = [torch.tensor(ids) for ids in inputs]
            # `pad_sequence` is used, because padding by the tokenizer would change the state of the tokenizer, which another
            # thread uses.
            features = {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id or 0),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            }
        on_device = {
            name: value.to(self._model.device) if isinstance(value, Tensor) else value for name, value in features.items()
        }
        vectors: Tensor = self._model(on_device)["sentence_embedding"]
        return vectors.float().cpu()

    def _embeds_tokens_as(self, expected: Tensor) -> bool:
        """Return whether the model accepts token ids, and gives the vector `expected` for the token ids of `_PROBE`."""
        try:
            return torch.allclose(self._embed([self._ids(_PROBE)]), expected, atol=_TOLERANCE)
        except Exception as error:  # for example, the model accepts only texts
            if is_out_of_memory(error):
                raise
            return False

    def _too_long(self, what: str) -> ConfigError:
        message = f"{what}; this model takes at most {self._max_tokens} tokens."
        return ConfigError(code="context_length_exceeded", message=message, hint="Split the input.", param="input")


def _load(folder: Path) -> Any:
    check_embeds(folder)
    for pickle in folder.rglob("pytorch_model.bin"):
        if not any(pickle.parent.glob("*.safetensors")):
            raise _unusable(folder, f"has pickled weights ({pickle.relative_to(folder)}); only safetensors are loaded")
    try:
        model = SentenceTransformer(
            str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        ).eval()
    except Exception as error:  # broken folders raise all kinds of exceptions
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, f"cannot be loaded as an embedding model: {first_line(error)}") from error
    if not (folder / "modules.json").is_file():
        pooling = model[-1].pooling_mode if len(model) > 1 else "its own"
        logger.warning(
            "The model in %s has no modules.json, so %s pooling is used; if the model needs another pooling, "
            "its vectors are wrong.",
            folder, pooling,
        )  # fmt: skip
    return model


def _unusable(folder: Path, problem: str) -> ModelError:
    return ModelError(code="model_invalid", message=f"The model in {folder} {problem}.", param="model")


def _invalid(message: str, param: str) -> ConfigError:
    return ConfigError(code="invalid_value", message=message, param=param)
