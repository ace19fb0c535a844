"""The HTTP layer of a worker: bodies, headers, errors, and the queue of jobs."""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from sage.common.errors import SageError
from sage.llm.workers import server
from sage.llm.workers.jobs import ClientGone, Job, Lane, unless_gone
from sage.llm.workers.time_limit import TimeLimitExceeded, within

JSON = {"content-type": "application/json"}


class Anything(BaseModel):
    value: Any = None


@pytest.fixture
def app() -> FastAPI:
    made = server.create_app("test", lambda: None)

    @made.post("/echo")
    async def echo(body: Anything) -> Any:
        if isinstance(body.value, str) and body.value.startswith("raise"):
            raise {"raise memory": MemoryError, "raise": RuntimeError}[body.value](body.value[::-1])
        return body.value

    return made


def ask(app: FastAPI, method: str = "POST", path: str = "/echo", **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:5") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code", "hint"}
    return error


def nested(depth: int) -> bytes:
    return b'{"value":' + b"[" * depth + b"]" * depth + b"}"


def test_health_names_the_engine_and_the_process(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_ENGINE_ID", "engine-0123456789")
    health = ask(app, "GET", "/health").json()
    assert (health["status"], health["engine"]) == ("ok", "engine-0123456789")
    assert isinstance(health["pid"], int)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"), (b"\xff", "invalid_json"), (b'{"value": NaN}', "invalid_json"),
        (b'{"value": ' + b"9" * 5000 + b"}", "invalid_json"), (b'{"value": "\xed\xa0\x80"}', "invalid_json"),
        (rb'{"value": "\ud83d"}', "invalid_unicode"), (rb'{"value": "\ude00\ud83d"}', "invalid_unicode"),
        (rb'{"\uD83D": 1}', "invalid_unicode"), (nested(100), "nesting_too_deep"), (nested(100_000), "nesting_too_deep"),
        (b"", "missing_value"), (b"[]", "invalid_value"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_invalid_body_is_rejected_with_its_reason(app: FastAPI, content: bytes, code: str) -> None:
    answer = ask(app, content=content, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize("content", [rb'{"value": "\ud83d\ude00"}', '{"value": "😀"}'.encode()])
def test_complete_characters_are_accepted(app: FastAPI, content: bytes) -> None:
    assert ask(app, content=content, headers=JSON).json() == "😀"


def test_nesting_within_the_limit_is_accepted(app: FastAPI) -> None:
    assert ask(app, content=nested(99), headers=JSON).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_rejected_while_it_is_read(app: FastAPI, is_chunked: bool) -> None:
    app.state.max_request_bytes = 1000
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b" " * 100

    answer = ask(app, content=chunks() if is_chunked else b" " * 10_000, headers=JSON)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"
    assert sent <= 1200
    assert ask(app, content=b'{"value": 1}' + b" " * 900, headers=JSON).status_code == 200


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", None])
def test_bodies_of_other_content_types_are_rejected(app: FastAPI, media_type: str | None) -> None:
    answer = ask(app, content=b'{"value": 1}', headers={"content-type": media_type} if media_type else {})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


def test_json_with_a_charset_is_json(app: FastAPI) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert ask(app, content=b'{"value": 1}', headers=headers).json() == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "file://"}, {"origin": "http://[bad"},
        {"origin": "http://127.0.0.1.evil.example"}, {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"},
        {"host": ""}, {"host": "[bad"}, {"host": "192.168.1.5:80"},
    ],
    ids=str,
)  # fmt: skip
def test_requests_from_pages_of_other_sites_are_rejected(app: FastAPI, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/health"), ("POST", "/echo")):
        answer = ask(app, method, path, json={"value": 1}, headers=headers)
        assert answer.status_code == 403
        assert error_of(answer)["code"] in ("origin_not_allowed", "host_not_allowed")


@pytest.mark.parametrize(
    "headers", [{"origin": "http://localhost:3000"}, {"origin": "http://[::1]"}, {"host": "localhost"}, {"host": "[::1]:5"}]
)
def test_requests_from_pages_of_this_machine_are_accepted(app: FastAPI, headers: dict[str, str]) -> None:
    assert ask(app, json={"value": 1}, headers=headers).status_code == 200


def test_errors_for_unknown_routes_and_methods_have_the_format_of_openai(app: FastAPI) -> None:
    assert (lambda answer: (answer.status_code, error_of(answer)["code"]))(ask(app, "GET", "/no")) == (404, "not_found")
    answer = ask(app, "GET", "/echo")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")


def test_an_unexpected_error_is_reported_and_logged_without_the_prompt(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        failed, full = ask(app, json={"value": "raise"}), ask(app, json={"value": "raise memory"})
    assert (failed.status_code, error_of(failed)["code"]) == (500, "internal_error")
    assert (full.status_code, error_of(full)["code"]) == (503, "out_of_memory")
    assert "Retry-After" in full.headers
    assert "test_workers_http.py" in caplog.text  # the traceback names the file that raised the error
    assert "esiar" not in caplog.text + failed.text + full.text


class Connection:
    """A client that disconnects when the test tells it to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def pieces_of(job: Job[int]) -> list[int]:
    return [piece async for piece in job]


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), MemoryError(), SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr
)
def test_any_exception_of_a_job_ends_it_and_frees_the_lane(error: BaseException) -> None:
    def fail(job: Job[int]) -> None:
        job.put(1)
        raise error

    async def scenario() -> list[int]:
        lane = Lane("Test")
        job = lane.submit(fail)
        assert await anext(job) == 1
        with pytest.raises(SageError):
            await anext(job)
        with pytest.raises(SageError):
            await lane.call(lambda: fail(job))
        return await pieces_of(lane.submit(lambda job: job.put(2)))

    assert asyncio.run(scenario()) == [2]


def test_cancelled_jobs_leave_the_queue_without_being_executed() -> None:
    done: list[str] = []
    may_end = threading.Event()

    def note(name: str, wait: bool = False) -> Callable[[Job[int]], None]:
        def work(job: Job[int]) -> None:
            done.append(name)
            if wait:
                may_end.wait(30)

        return work

    async def scenario() -> None:
        lane = Lane("Test")
        first, given_up, last = (
            lane.submit(note("first", wait=True)),
            lane.submit(note("given up")),
            lane.submit(note("last")),
        )
        given_up.abandon()
        may_end.set()
        await asyncio.gather(pieces_of(first), pieces_of(last))

    asyncio.run(scenario())
    assert done == ["first", "last"]


def test_closing_a_lane_fails_the_waiting_jobs() -> None:
    async def scenario() -> None:
        lane = Lane("Test")
        jobs: list[Job[int]] = [lane.submit(lambda job: job.gone.wait(30) and None) for _ in range(2)]
        lane.close()
        for job in jobs:
            with pytest.raises(SageError, match="being stopped"):
                await anext(job)

    asyncio.run(scenario())


def test_work_is_cancelled_if_the_client_disconnects() -> None:
    async def scenario() -> None:
        connection, was_cancelled = Connection(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled.set()
                raise

        waiting = asyncio.ensure_future(unless_gone(connection, work()))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        connection.left.set()
        with pytest.raises(ClientGone):
            await waiting
        await asyncio.wait_for(was_cancelled.wait(), 30)

    asyncio.run(scenario())


def test_the_result_or_exception_of_finished_work_is_passed_on() -> None:
    async def work(fails: bool) -> int:
        if fails:
            raise ValueError
        return 5

    async def scenario() -> int:
        with pytest.raises(ValueError):
            await unless_gone(Connection(), work(True))  # type: ignore[arg-type]
        return await unless_gone(Connection(), work(False))  # type: ignore[arg-type]

    assert asyncio.run(scenario()) == 5


def test_code_that_does_not_end_is_stopped() -> None:
    def spin() -> None:
        while True:
            with contextlib.suppress(Exception):  # some template filters suppress exceptions, too
                json.dumps(1)

    with pytest.raises(TimeLimitExceeded):
        within(0.05, spin)
    assert within(30, lambda: 5) == 5


def test_a_server_that_cannot_answer_any_more_ends_with_the_reason() -> None:
    def about() -> dict[str, Any]:
        raise SageError(code="internal_error", message="The thread has ended.")

    app = server.create_app("test", lambda: None, about)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    with pytest.raises(SageError, match="The thread has ended"):
        server.serve(config, app, None)
