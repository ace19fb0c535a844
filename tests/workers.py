"""Send requests to an inference server in the test's process, and read its answers."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class Server:
    """Sends requests to an application."""

    app: FastAPI

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return asyncio.run(post(self.app, path, body))

    def chat(self, **more: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", {"model": "m", "messages": HELLO, "max_tokens": 8, "temperature": 0, **more}
        )

    def complete(self, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "m", "prompt": "Hello", "max_tokens": 8, "temperature": 0, **more})

    def embed(self, given: Any, **more: Any) -> httpx.Response:
        return self.post("/v1/embeddings", {"model": "m", "input": given, **more})


class Client:
    """An ASGI client that disconnects when the test calls `leave`."""

    def __init__(self, app: FastAPI, **body: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.answered = asyncio.Event()
        self._left = asyncio.Event()
        self._body = [json.dumps({"model": "m", "messages": HELLO, "temperature": 0, **body}).encode()]
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "headers": headers,
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop()}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.answered.set()

    async def leave(self) -> None:
        self._left.set()
        await self.task


async def post(app: FastAPI, path: str, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.post(path, json=body, timeout=60)


def asked_at_once(app: FastAPI, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send all requests at the same time, and return the bodies of the answers."""

    async def send() -> list[httpx.Response]:
        return await asyncio.gather(*(post(app, path, body) for body in bodies))

    return [answer.json() for answer in asyncio.run(send())]


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
    """Check that the OpenAPI document describes the request bodies and the error responses."""
    for path, methods in app.openapi()["paths"].items():
        if "post" in methods:
            assert methods["post"]["requestBody"]["content"].keys() == {"application/json"}, path
            assert {"200", "400", "413", "415"} <= methods["post"]["responses"].keys()
