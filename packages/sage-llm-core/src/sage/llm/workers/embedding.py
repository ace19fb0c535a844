"""Serve `/v1/embeddings` with sentence-transformers: `python -m sage.llm.workers embedding --model M --port P`."""

import base64
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import Tensor

from sage.llm.workers import server
from sage.llm.workers.embedder import Embedder
from sage.llm.workers.embedding_queue import Batcher
from sage.llm.workers.jobs import Lane, unless_gone
from sage.llm.workers.requests import EmbeddingRequest

#: Maximum number of tokens in a batch, including padding tokens. On a CPU, larger batches do not compute more tokens per
#: second, but delay other requests.
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 1024, 16_384


def build(name: str) -> FastAPI:
    """Load the model and return the server. Raises ModelError."""
    embedder, tokenization = Embedder(name), Lane("Tokenization")
    read_tokens = 0
    batcher = Batcher(embedder.embed, _GPU_BATCH_TOKENS if torch.cuda.is_available() else _CPU_BATCH_TOKENS)

    def close() -> None:
        tokenization.close()
        batcher.close()

    async def answer(request: EmbeddingRequest) -> JSONResponse:
        nonlocal read_tokens
        inputs = await tokenization.call(lambda: embedder.read(request))
        lengths = [each.tokens for each in inputs]
        job = batcher.submit(inputs, lengths)
        read_tokens += sum(lengths)
        try:
            vectors = await anext(job)
        finally:
            job.abandon()
        return JSONResponse(_response(request, vectors, sum(lengths)))

    def about() -> dict[str, Any]:
        batcher.check()
        return {"tokens": {"": [read_tokens, 0]}}

    app = server.create_app("SAGE embeddings", close, about)

    @app.post("/v1/embeddings", response_model=None, responses=server.ANSWERED)
    async def embeddings(request: EmbeddingRequest, connection: Request) -> JSONResponse:
        """Return the embedding vectors of texts."""
        return await unless_gone(connection, answer(request))

    return app


def _response(request: EmbeddingRequest, vectors: list[Tensor], tokens: int) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(_shortened(vector, request.dimensions), request)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}


def _shortened(vector: Tensor, dimensions: int | None) -> Tensor:
    """Return the first `dimensions` components of a vector, normalized again as in OpenAI's API. None: the whole vector."""
    return vector if dimensions is None else torch.nn.functional.normalize(vector[:dimensions], dim=0)


def _encoded(vector: Tensor, request: EmbeddingRequest) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def main() -> None:
    """Serve until SIGTERM."""
    arguments = server.parser().parse_args()
    server.run(lambda: build(arguments.model), arguments)
