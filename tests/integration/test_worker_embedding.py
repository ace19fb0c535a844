"""The embedding server with a real model, in this process."""

import asyncio
import base64
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from transformers import AutoTokenizer
from workers import Server, check_document, error_of

from sage.common.errors import ModelError
from sage.libs.models.resolve import resolve_model
from sage.llm.workers import embedding
from sage.llm.workers.embedder import Embedder


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder("all-minilm-l6-v2")


@pytest.fixture
def embeddings(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(embedding, "Embedder", lambda *_: embedder)
    return Server(embedding.build("minilm"))


def test_embeddings_take_texts_and_token_ids(embeddings: Server, embedder: Embedder) -> None:
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
    ("given", "more", "param", "reason"),
    [
        ("", {}, "input", "input 0 is empty"), (["a", ""], {}, "input", "input 1 is empty"),
        ([], {}, "input", "input is empty"), ([[]], {}, "input", "input is empty"),
        ("word " * 300, {}, "input", "has 302 tokens; this model takes at most 256"),
        ([5] * 300, {}, "input", "has 300 tokens"),
        ("a" * 10**6, {}, "input", "has 1000000 characters"), ([10**6], {}, "input", "does not exist"),
        ("a", {"dimensions": 385}, "dimensions", "dimensions is 385; this model's vectors have only 384"),
        ("a", {"input_type": "query"}, "input_type", "not supported"),
    ],
)  # fmt: skip
def test_empty_too_long_and_unsupported_requests_are_refused(
    embeddings: Server, given: Any, more: dict[str, Any], param: str, reason: str
) -> None:
    error = error_of(embeddings.embed(given, **more))
    assert error["param"] == param
    assert reason in error["message"]


def test_concurrent_requests_get_the_same_embeddings_as_one_request_with_all_texts(embeddings: Server) -> None:
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


def test_inputs_of_a_client_that_disconnected_are_not_computed(
    embeddings: Server, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, batches, may_go_on, has_begun = embedder._embed, list[int](), threading.Event(), threading.Event()

    def slow(inputs: list[Any]) -> torch.Tensor:
        batches.append(len(inputs))
        has_begun.set()
        may_go_on.wait(60)
        return embed(inputs)

    monkeypatch.setattr(embedder, "_embed", slow)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(embeddings.app), base_url="http://127.0.0.1") as client:
            asked = [
                asyncio.ensure_future(client.post("/v1/embeddings", json={"model": "m", "input": given}, timeout=60))
                for given in ("first", ["word " * 200] * 50)
            ]
            await asyncio.to_thread(has_begun.wait, 60)
            asked[1].cancel()
            await asyncio.wait([asked[1]])
            may_go_on.set()
            assert (await asked[0]).status_code == 200

    asyncio.run(scenario())
    assert sum(batches) <= 5  # at most the batch in progress


def test_vectors_as_base64_are_the_same_numbers(embeddings: Server) -> None:
    numbers = embeddings.embed("a cat").json()["data"][0]["embedding"]
    encoded = embeddings.embed("a cat", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == numbers


def save_minilm(folder: Path, *modules: Any, **options: Any) -> Path:
    """Save the transformer of all-minilm-l6-v2, followed by other modules, in the format of sentence-transformers."""
    transformer = SentenceTransformer(str(resolve_model("all-minilm-l6-v2").folder))[0]
    SentenceTransformer(modules=[transformer, *modules], **options).save_pretrained(str(folder))
    return folder


def dense() -> Any:
    torch.manual_seed(0)
    return Dense(384, 48)


def static(folder: Path) -> Path:
    tokenizer = SentenceTransformer(str(resolve_model("all-minilm-l6-v2").folder)).tokenizer
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)]).save_pretrained(str(folder))
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "cls": lambda folder: save_minilm(folder, Pooling(384, "cls")),
    "several poolings": lambda folder: save_minilm(folder, Pooling(384, ("mean", "max")), Normalize()),
    "last token and dense": lambda folder: save_minilm(folder, Pooling(384, "lasttoken"), dense(), Normalize()),
    "weighted mean and a prompt": lambda folder: save_minilm(
        folder, Pooling(384, "weightedmean"), prompts={"query": "Represent this: "}, default_prompt_name="query"
    ),
    "a prompt that is not pooled": lambda folder: save_minilm(
        folder,
        Pooling(384, "mean", include_prompt=False),
        prompts={"query": "Represent this: "},
        default_prompt_name="query",
    ),
    "static vectors": static,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sentence_transformers_folder_gives_the_same_vectors_as_the_library(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path / "model")
    texts = ["a cat", "a much longer text about the stock market in 1929", "cats"]
    expected = SentenceTransformer(str(folder)).encode(texts, convert_to_tensor=True)
    answer = Server(embedding.build(str(folder))).embed(texts)
    assert answer.status_code == 200, answer.text
    vectors = torch.tensor([item["embedding"] for item in answer.json()["data"]])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_a_plain_folder_of_transformers_is_pooled_by_the_mean_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_minilm(tmp_path / "model", Pooling(384, "mean"))
    for path in (tmp_path / "model").glob("*sentence*"):
        path.unlink()
    (tmp_path / "model" / "modules.json").unlink()
    with caplog.at_level(logging.WARNING):
        answer = Server(embedding.build(str(tmp_path / "model"))).embed("a cat")
    assert "mean pooling is used" in caplog.text
    expected = SentenceTransformer(str(resolve_model("all-minilm-l6-v2").folder)).encode(["a cat"], convert_to_tensor=True)
    vector = torch.tensor(answer.json()["data"][0]["embedding"])
    torch.testing.assert_close(torch.nn.functional.normalize(vector, dim=0), expected[0], atol=1e-5, rtol=0)


def test_a_model_that_takes_only_text_rejects_token_ids(tmp_path: Path) -> None:
    error = error_of(Server(embedding.build(str(static(tmp_path / "model")))).embed([5, 6]))
    assert (error["param"], error["message"]) == ("input", "input 0: this model takes text, not token ids.")


def pickle_weights(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def bring_code(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "evil.Code"}]')


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"), [(pickle_weights, "pickled"), (bring_code, "evil"), (lose_weights, "cannot be loaded")]
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(
    spoil: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    folder = save_minilm(tmp_path / "model", Pooling(384, "mean"), dense())
    spoil(folder)
    with pytest.raises(ModelError, match=reason):
        Embedder(str(folder))


def test_the_openapi_document_describes_the_requests(embeddings: Server) -> None:
    check_document(embeddings.app)
