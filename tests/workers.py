"""Requests to an inference server in this process, and what its answers say."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Server:
    """An application and the requests that a test sends to it."""

    app: FastAPI

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1") as client:
                return await client.post(path, json={"model": "m", **body}, timeout=60)

        return asyncio.run(send())

    def chat(self, **more: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 8, "temperature": 0, **more})

    def complete(self, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Hello", "max_tokens": 8, "temperature": 0, **more})

    def embed(self, given: Any, **more: Any) -> httpx.Response:
        return self.post("/v1/embeddings", {"input": given, **more})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.count("[DONE]") in (0, 1)
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check_document(app: FastAPI) -> None:
    """Check that the OpenAPI document describes the requests and the refusals."""
    for path, methods in app.openapi()["paths"].items():
        if "post" in methods:
            assert methods["post"]["requestBody"]["content"].keys() == {"application/json"}, path
            assert {"200", "400", "413", "415"} <= methods["post"]["responses"].keys()
