"""The embedding server with a real model, in this process."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer
from workers import Server, check_document, error_of

from sage.llm.workers import embedding


@pytest.fixture(scope="module")
def embedder() -> embedding.Embedder:
    return embedding.Embedder("all-minilm-l6-v2")


@pytest.fixture
def embeddings(embedder: embedding.Embedder, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(embedding, "Embedder", lambda *_: embedder)
    return Server(embedding.build("minilm"))


def test_embeddings_take_texts_and_token_ids(embeddings: Server, embedder: embedding.Embedder) -> None:
    def vectors(given: Any, **more: Any) -> torch.Tensor:
        answer = embeddings.embed(given, **more)
        assert answer.status_code == 200, answer.text
        return torch.tensor([item["embedding"] for item in answer.json()["data"]])

    texts = ["a cat", "a much longer text about the stock market in 1929", "a kitten"] * 20
    many = vectors(texts)
    assert many.shape == (60, 384)
    torch.testing.assert_close(many[:3], torch.cat([vectors(text) for text in texts[:3]]), atol=1e-5, rtol=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(embedder._model[0].auto_model.config._name_or_path)
    ids = tokenizer(texts[:3])["input_ids"]
    torch.testing.assert_close(vectors(ids), many[:3], atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors(ids[0]), many[:1], atol=1e-5, rtol=0)
    assert embeddings.embed(texts[:3]).json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    shortened = vectors("a cat", dimensions=64)
    torch.testing.assert_close(shortened, torch.nn.functional.normalize(many[:1, :64]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "more", "param", "told"),
    [
        ("", {}, "input", "input 0 is empty"), (["a", ""], {}, "input", "input 1 is empty"), ([], {}, "input", "input must"),
        ("word " * 300, {}, "input", "has 302 tokens; this model takes 256"), ([5] * 300, {}, "input", "has 300 tokens"),
        ("a" * 10**6, {}, "input", "has 1000000 characters"), ([10**6], {}, "input", "does not exist"),
        ("a", {"dimensions": 385}, "dimensions", "384"), ("a", {"input_type": "query"}, "input_type", "not supported"),
    ],
)  # fmt: skip
def test_embeddings_of_nothing_or_too_much_are_refused(
    embeddings: Server, given: Any, more: dict[str, Any], param: str, told: str
) -> None:
    error = error_of(embeddings.embed(given, **more))
    assert error["param"] == param
    assert told in error["message"]


def test_embeddings_asked_for_at_once_are_those_asked_for_alone(embeddings: Server) -> None:
    texts = [f"text {'and more ' * (index % 7)}number {index}" for index in range(40)]

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(embeddings.app), base_url="http://127.0.0.1") as client:
            asked: list[Awaitable[httpx.Response]] = [
                client.post("/v1/embeddings", json={"model": "m", "input": [text, "short"]}, timeout=60) for text in texts
            ]
            return await asyncio.gather(*asked)

    alone = torch.tensor([item["embedding"] for item in embeddings.embed(texts).json()["data"]])
    for index, answer in enumerate(asyncio.run(ask_all())):
        torch.testing.assert_close(torch.tensor(answer.json()["data"][0]["embedding"]), alone[index], atol=1e-5, rtol=0)


def test_the_openapi_document_describes_the_requests(embeddings: Server) -> None:
    check_document(embeddings.app)
