"""`python -m sage.llm.workers.embedding --model M --port P`: `/v1/embeddings` by sentence-transformers."""

import base64
from typing import Any

import torch
from fastapi import FastAPI, Request
from sentence_transformers import SentenceTransformer
from torch import Tensor

from sage.common.errors import ConfigError, ModelError
from sage.llm.workers import server
from sage.llm.workers.jobs import Job, Lane, unless_gone
from sage.llm.workers.requests import EmbeddingRequest

_BATCH = 32
#: Far above any real text; longer inputs are rejected without tokenizing them.
_MAX_CHARACTERS_PER_TOKEN = 100
Vectors = tuple[list[Tensor], int]


class Embedder:
    """A loaded model with its tokenizer; not thread-safe."""

    def __init__(self, name: str) -> None:
        """Load the model. Raises ModelError."""
        _, folder = server.load_source(name)
        try:
            options = {"use_safetensors": True}
            self._model: Any = SentenceTransformer(str(folder), local_files_only=True, model_kwargs=options)
        except (OSError, ValueError, KeyError) as error:
            message = f"{folder} does not load as an embedding model: {error}"
            raise ModelError(code="model_invalid", message=message) from error
        self._tokenizer: Any = self._model.tokenizer
        if not callable(self._tokenizer):  # a model of static vectors
            message = f"{folder} is an embedding model without a tokenizer of transformers."
            raise ModelError(code="model_unsupported", message=message)
        self._max_tokens: int | None = self._model.max_seq_length
        self._prompt: str = self._model.prompts.get(self._model.default_prompt_name) or ""

    def embed(self, request: EmbeddingRequest, job: Job[Vectors]) -> None:
        """Put the vectors, in the order of the inputs, and the number of tokens. Raises ConfigError."""
        inputs, width = request.input, self._model.get_embedding_dimension()
        if request.dimensions and request.dimensions > width:
            raise _invalid(f"dimensions: this model's vectors have {width}.", "dimensions")
        lengths = [self._checked_length(index, given) for index, given in enumerate(inputs)]
        vectors: list[Tensor] = [torch.empty(0)] * len(inputs)
        order = sorted(range(len(inputs)), key=lengths.__getitem__)  # texts of one length need no padding
        for start in range(0, len(order), _BATCH):
            if job.gone.is_set():
                return
            batch = order[start : start + _BATCH]
            for index, vector in zip(batch, self._encode([inputs[index] for index in batch]), strict=True):
                vectors[index] = _shortened(vector.float().cpu(), request.dimensions)
        job.put((vectors, sum(lengths)))

    def _encode(self, inputs: list[Any]) -> Tensor:
        """Return (inputs, dimensions); token ids are used as they are."""
        if isinstance(inputs[0], str):
            return self._model.encode(inputs, batch_size=_BATCH, convert_to_tensor=True, show_progress_bar=False)
        features = self._tokenizer.pad({"input_ids": inputs}, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return self._model(dict(features))["sentence_embedding"]

    def _checked_length(self, index: int, given: str | list[int]) -> int:
        """Return the number of tokens of an input. Raises ConfigError if it is empty, too long or has unknown tokens."""
        place = f"input {index}"
        if not given:
            raise _invalid(f"{place} is empty.", "input")
        if isinstance(given, list):
            if max(given) >= (known := len(self._tokenizer)):
                raise _invalid(f"{place}: token {max(given)} does not exist, the model has {known}.", "input")
            length = len(given)
        elif self._max_tokens and len(given) > self._max_tokens * _MAX_CHARACTERS_PER_TOKEN:
            raise self._too_long(f"{place} has {len(given)} characters")
        else:
            length = len(self._tokenizer(self._prompt + given, truncation=False, verbose=False)["input_ids"])
        if self._max_tokens and length > self._max_tokens:
            raise self._too_long(f"{place} has {length} tokens")
        return length

    def _too_long(self, what: str) -> ConfigError:
        message = f"{what}; this model takes {self._max_tokens} tokens."
        return ConfigError(code="context_length_exceeded", message=message, hint="Split it.", param="input")


def build(name: str) -> FastAPI:
    """Load the model and return the server. Raises ModelError."""
    embedder, lane = Embedder(name), Lane("Embedding")
    app = server.create_app("SAGE embeddings", lane.close)

    @app.post("/v1/embeddings", responses=server.ANSWERED)
    async def embeddings(request: EmbeddingRequest, connection: Request) -> dict[str, Any]:
        """Turn texts into vectors."""
        job: Job[Vectors] = lane.submit(lambda job: embedder.embed(request, job))
        try:
            vectors, tokens = await unless_gone(connection, anext(job))
        finally:
            job.abandon()
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": request.model, "data": data, "usage": usage}

    return app


def _shortened(vector: Tensor, dimensions: int | None) -> Tensor:
    """Return the first components of a vector, normalized again, as OpenAI does."""
    return vector if dimensions is None else torch.nn.functional.normalize(vector[:dimensions], dim=0)


def _encoded(vector: Tensor, encoding_format: str | None) -> list[float] | str:
    """Return a vector as numbers, or as base64 of little-endian fp32."""
    if encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _invalid(message: str, param: str) -> ConfigError:
    return ConfigError(code="invalid_value", message=message, param=param)


if __name__ == "__main__":
    arguments = server.parser().parse_args()
    server.run(lambda: build(arguments.model), arguments)
