"""`python -m sage.llm.workers.embedding --model M --port P`: `/v1/embeddings` by sentence-transformers."""

import base64
import struct
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field
from sentence_transformers import SentenceTransformer

from sage.common.errors import ConfigError, ModelError
from sage.llm.workers import server


class EmbeddingRequest(BaseModel):
    """OpenAI's request for embeddings."""

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def build(name: str) -> FastAPI:
    """Load the model and return the server. Raises ModelError."""
    _, folder = server.load_source(name)
    try:
        model = SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(code="model_invalid", message=f"{folder} does not load as an embedding model: {error}") from error
    app = server.create_app()

    @app.post("/v1/embeddings")
    def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        width = model.get_embedding_dimension()
        if request.dimensions not in (None, width):
            raise ConfigError(
                code="invalid_value",
                message=f"dimensions: this model's vectors have {width}.",
                hint="Leave it away.",
                param="dimensions",
            )
        texts = [request.input] if isinstance(request.input, str) else request.input
        vectors = model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
        tokens = sum(len(ids) for ids in model.tokenizer(texts, truncation=True)["input_ids"])
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector.tolist(), request.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": request.model, "data": data, "usage": usage}

    return app


def _encoded(vector: list[float], encoding_format: str) -> list[float] | str:
    """Return a vector as numbers, or as base64 of little-endian fp32."""
    if encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


if __name__ == "__main__":
    arguments = server.parser().parse_args()
    server.run(lambda: build(arguments.model), arguments.port)
