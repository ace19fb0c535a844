"""Requests that the gateway rejects before it sends anything to an engine."""

import asyncio
import functools
import json
import os
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from gateways import ASK, CHAT
from pydantic import BaseModel, SecretStr

from sage.common.errors import ConfigError
from sage.common.settings import Settings, load_settings
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.gateway import json_text
from sage.llm.gateway.access import check_exposure
from sage.llm.gateway.app import create_app
from sage.llm.gateway.bodies import Body, BodyBudget
from sage.llm.gateway.json_text import LARGE_BYTES
from sage.llm.workers.requests import ChatRequest, CompletionRequest, EmbeddingRequest

LONE_SURROGATE = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}'
START = "/v1/management/engines/start"
JSON = {"Content-Type": "application/json"}


def request(method: str, path: str, *, settings: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    """Send one request through the complete application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(_app(os.environ["SAGE_HOME"], **settings or {}))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8889") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@functools.cache
def _app(_home: str, **settings: Any) -> FastAPI:
    return create_app(load_settings().model_copy(update=settings))


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Check that the error has OpenAI's format, and return its status and code."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["message"].endswith(error["hint"])
    assert answer.headers["x-request-id"]
    return answer.status_code, error["code"]


@pytest.mark.parametrize("key", [None, SecretStr("")])
def test_an_empty_key_does_not_allow_requests_from_the_network(key: SecretStr | None) -> None:
    settings = Settings(gateway_host="0.0.0.0").model_copy(update={"api_key": key})
    with pytest.raises(ConfigError, match="Set SAGE_API_KEY"):
        check_exposure(settings)
    with pytest.raises(ConfigError):
        create_app(settings)
    assert refusal(request("GET", "/v1/models", settings={"api_key": key}, headers={"Host": "evil.example"}))[0] == 403


def test_if_a_key_is_set_only_health_can_be_read_without_it() -> None:
    with_key = {"api_key": SecretStr("sk-secret")}
    for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/v1/management/engines"):
        assert refusal(request("GET", path, settings=with_key)) == (401, "invalid_api_key")
    for wrong in ("Bearer sk-secre", "Bearer sk-secret2", "Basic sk-secret", "sk-secret", "Bearer schlüssel".encode()):
        assert request("GET", "/v1/models", settings=with_key, headers={"Authorization": wrong}).status_code == 401
    for right in ("Bearer sk-secret", "bearer sk-secret"):
        answer = request("GET", "/v1/models", settings=with_key, headers={"Authorization": right, "Host": "box.example"})
        assert answer.status_code == 200
    assert request("GET", "/health", settings=with_key).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8889", "127.0.0.1.evil.example", "[", ""])
def test_a_request_with_a_foreign_host_name_is_rejected(host: str) -> None:
    assert refusal(request("GET", "/v1/models", headers={"Host": host})) == (403, "host_not_allowed")


def test_a_second_host_header_is_checked_too() -> None:
    headers = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    assert refusal(request("GET", "/v1/models", headers=headers)) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:8889", "LOCALHOST", "127.0.0.1", "[::1]:8889"])
def test_the_names_of_this_machine_are_accepted(host: str) -> None:
    assert request("GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost.evil.example", "file://"])
def test_requests_from_pages_of_other_sites_are_rejected(origin: str) -> None:
    for method, path in (("POST", CHAT), ("POST", START), ("GET", "/v1/models"), ("DELETE", "/v1/management/engines/e")):
        body = {"json": ASK} if method == "POST" else {}
        assert refusal(request(method, path, headers={"Origin": origin}, **body)) == (403, "origin_not_allowed")
    assert refusal(request("POST", CHAT, headers={"Origin": "http://localhost:3000"}, json=ASK)) == (404, "model_not_found")


@pytest.mark.parametrize("media_type", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonp"])
def test_only_json_bodies_are_accepted(media_type: str) -> None:
    for path in (CHAT, START):
        answer = request("POST", path, content=json.dumps(ASK), headers={"Content-Type": media_type})
        assert refusal(answer) == (415, "unsupported_media_type")
    answer = request("POST", CHAT, content=json.dumps(ASK), headers={"Content-Type": "application/json; charset=utf-8"})
    assert refusal(answer) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "tiny", "temperature": NaN}', "invalid_json"),
        (b'{"model": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"model": "tiny", "x": ' + b"[" * 101 + b"]" * 101 + b"}", "json_too_deep"),
        (b'{"model": "tiny", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "json_too_deep"),
        (b"[" * 100_000 + b"]" * 100_000, "json_too_deep"),
        (LONE_SURROGATE, "invalid_unicode"),
        (b'{"model": "\\udfff"}', "invalid_unicode"),
    ],
)
def test_a_body_that_is_not_valid_json_is_a_400_on_every_route(body: bytes, code: str) -> None:
    for path in (CHAT, "/v1/completions", "/v1/embeddings", START, "/v1/management/engines"):
        assert refusal(request("POST", path, content=body, headers=JSON)) == (400, code)


def test_other_requests_are_answered_while_a_large_body_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answered = threading.Event(), threading.Event()
    check = json_text._parse

    def check_later(body: bytes) -> json_text.JsonBody:
        if len(body) > LARGE_BYTES:
            begun.set()
            assert answered.wait(20)
        return check(body)

    async def main() -> None:
        monkeypatch.setattr(json_text, "_parse", check_later)
        transport = httpx.ASGITransport(_app(os.environ["SAGE_HOME"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8889") as client:
            content = b" " * LARGE_BYTES + b'{"model": "tiny", "x": [NaN]}'
            large = asyncio.create_task(client.post(CHAT, content=content, headers=JSON))
            assert await asyncio.to_thread(begun.wait, 20)
            assert (await client.get("/health")).status_code == 200
            assert refusal(await client.post(CHAT, content=b'{"x": NaN}', headers=JSON)) == (400, "invalid_json")
            answered.set()
            assert refusal(await large) == (400, "invalid_json")

    asyncio.run(main())


@pytest.mark.parametrize("content", [[], "text", 1, {"model": 1}, {"model": ""}, {"model": "m" * 513}, {"messages": []}])
def test_a_request_without_a_usable_model_is_a_400(content: Any) -> None:
    assert refusal(request("POST", CHAT, json=content)) == (400, "model_required")


def test_an_empty_body_is_a_400() -> None:
    assert refusal(request("POST", CHAT)) == (400, "invalid_json")
    assert refusal(request("POST", START)) == (400, "config_invalid")


def test_valid_unicode_and_allowed_nesting_are_accepted() -> None:
    emoji = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d\\ude00 \\\\ud83d"}]}'
    nested = b'{"model": "tiny", "x": ' + b"[" * 99 + b"]" * 99 + b"}"
    wide = json.dumps({"model": "tiny", "x": [[]] * 10_000}).encode()
    for body in (emoji, nested, wide):
        assert refusal(request("POST", CHAT, content=body, headers=JSON)) == (404, "model_not_found")
    deeper = nested.replace(b"[]", b"[[]]")
    assert refusal(request("POST", CHAT, content=deeper, headers=JSON)) == (400, "json_too_deep")


def test_the_size_of_a_body_is_limited_with_or_without_a_content_length() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100_000

    for body in (b" " * 1_000_001, chunks()):
        answer = request("POST", CHAT, settings={"max_request_mb": 1}, content=body, headers=JSON)
        assert refusal(answer) == (413, "request_too_large")
    assert (
        request("POST", CHAT, settings={"max_request_mb": 1}, content=json.dumps(ASK).ljust(10**6), headers=JSON).status_code
        == 404
    )


def test_the_total_size_of_all_bodies_is_limited_and_finished_bodies_are_subtracted() -> None:
    budget = BodyBudget(10)

    async def read(body: Body, text: bytes) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": text, "more_body": False}

        await body.read(b"", receive)  # type: ignore[arg-type]

    async def main() -> None:
        held = [budget.body() for _ in range(9)]
        for body in held[:8]:
            await read(body, b"0123456789")
        with pytest.raises(Exception, match="memory for request bodies is full"):
            await read(held[8], b"x")
        for body in held:
            with body:
                pass
        assert budget.left_bytes == 80
        await read(held[8], b"x")

    asyncio.run(main())


def test_an_unknown_path_is_a_404_and_a_wrong_method_is_a_405() -> None:
    assert refusal(request("GET", "/nope")) == (404, "not_found")
    assert refusal(request("POST", "/v1/chat/completions/", json=ASK)) == (404, "not_found")
    answer = request("GET", CHAT)
    assert refusal(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert refusal(request("DELETE", "/v1/models")) == (405, "method_not_allowed")
    assert request("HEAD", "/health").status_code == request("HEAD", "/v1/models").status_code == 200
    assert request("HEAD", CHAT).status_code == 405
    assert request("HEAD", "/v1/management/engines/engine-a/events").status_code == 405


@pytest.mark.parametrize("query", ["follow=true", "follow=true&offset=0", "follow=true&offset=99", "tail=5"])
def test_the_log_of_an_unknown_engine_is_a_404_before_a_stream_begins(query: str) -> None:
    assert refusal(request("GET", f"/v1/management/engines/engine-zzz/logs?{query}")) == (404, "engine_not_found")


@pytest.mark.parametrize("query", ["tail=-1", "tail=100001", "tail=x", "offset=-1", "offset=" + "9" * 23, f"offset={2**63}"])
def test_the_limits_of_a_log_query_are_checked(query: str) -> None:
    answer = request("GET", f"/v1/management/engines/engine-zzz/logs?follow=true&{query}")
    assert refusal(answer) == (400, "config_invalid")
    assert answer.json()["error"]["param"] == query.partition("=")[0]


def test_a_request_keeps_its_id_or_gets_a_new_one() -> None:
    made = {request("GET", "/health").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert request("GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert request("GET", "/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")


def test_the_log_has_request_ids_but_no_prompts_and_no_line_breaks_from_paths(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    request(
        "POST", CHAT, json={**ASK, "messages": [{"role": "user", "content": "my secret"}]}, headers={"x-request-id": "id-1"}
    )
    request("POST", "/a%0Aforged%20line", json={})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("sage.")]
    assert lines[0] == f"POST '{CHAT}' (id-1): 404"
    assert "\n" not in lines[1]
    assert "my secret" not in caplog.text


@pytest.mark.parametrize(("method", "path"), [("running", CHAT), ("start_engine", START)])
def test_an_unexpected_error_has_openai_s_format_and_is_logged_without_the_prompt(
    method: str, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ControlPlaneManager, method, fail)
    answer = request("POST", path, json={"model": "tiny", "metadata": {"prompt": "my secret"}})
    assert refusal(answer) == (500, "internal_error")
    assert answer.headers["x-request-id"] in caplog.text
    assert "a bug" in caplog.text
    assert "my secret" not in caplog.text


def test_a_lack_of_descriptors_is_a_503_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ControlPlaneManager, "running", fail)
    answer = request("POST", CHAT, json=ASK)
    assert refusal(answer) == (503, "too_many_connections")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("path", "model"), [(CHAT, ChatRequest), ("/v1/completions", CompletionRequest), ("/v1/embeddings", EmbeddingRequest)]
)
def test_the_openapi_document_lists_the_fields_that_our_engines_accept(path: str, model: type[BaseModel]) -> None:
    operation = request("GET", "/openapi.json").json()["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(model.model_fields)
    assert set(body["required"]) == {name for name, field in model.model_fields.items() if field.is_required()}
    assert "422" not in operation["responses"]
    assert {"400", "404", "415", "502", "503"} <= set(operation["responses"])
