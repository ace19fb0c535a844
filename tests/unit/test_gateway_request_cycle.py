"""The HTTP/1.1 server of the gateway: framing, keep-alive and back-pressure, tested with raw sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import uvicorn
import uvloop
from gateways import gateway, until
from starlette.types import ASGIApp, Receive, Scope, Send
from support import free_port

from sage.llm.gateway import connections, request_cycle
from sage.llm.gateway.connections import BoundedHttp

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 60))  # the gateway also uses uvloop


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """Serve an application, and yield the server and its port."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(
        app, port=port, http=BoundedHttp, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1,
    ))  # fmt: skip
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started, "a started server")
    try:
        yield server, port
    finally:
        server.should_exit = True
        await task


async def connect(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port)


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return (await reader.readuntil(b"\r\n\r\n")).lower()


async def hello(scope: Scope, _: Receive, send: Send) -> None:
    """Answer with the request's path."""
    body = scope["path"].encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def test_an_answer_of_known_length_is_sent_in_one_piece() -> None:
    async def main() -> None:
        async with serving(hello) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.read(65_536)).endswith(b"\r\n\r\n/a b")
            writer.close()

    run(main())


def test_an_answer_that_is_interrupted_by_a_stop_of_the_server_is_not_logged_as_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def endless(scope: Scope, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"piece", "more_body": True})
        await asyncio.Event().wait()

    async def main() -> None:
        async with serving(endless) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"piece")
        assert await reader.read() == b"\r\n"  # the last chunk of the answer is missing
        writer.close()

    caplog.set_level("INFO")
    run(main())
    assert "/ was interrupted, because the gateway stops" in caplog.text
    assert "failed" not in caplog.text


def test_pipelined_requests_are_answered_in_order_on_one_connection() -> None:
    async def main() -> None:
        async with serving(hello) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(5)))
            for number in range(5):
                assert b"connection: close" not in await head_of(reader)
                assert await reader.readexactly(2) == b"/%d" % number
            writer.close()

    run(main())


def test_the_answer_to_head_has_the_length_and_no_body() -> None:
    async def main() -> None:
        async with serving(hello) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"HEAD /abc HTTP/1.1\r\nHost: x\r\n\r\nGET /d HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"content-length: 4\r\n" in await head_of(reader)
            assert b"content-length: 2\r\n" in await head_of(reader)
            assert await reader.readexactly(2) == b"/d"
            writer.close()

    run(main())


@pytest.mark.parametrize(
    "request_head", [b"GET /a HTTP/1.0\r\n\r\n", b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
)
def test_the_connection_is_closed_after_the_answer_if_the_client_does_not_keep_it_alive(request_head: bytes) -> None:
    async def main() -> None:
        async with serving(hello) as (_, port):
            reader, writer = await connect(port)
            writer.write(request_head)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert (head.count(b"connection: close"), body) == (1, b"/a")
            writer.close()

    run(main())


def test_the_head_of_a_stream_arrives_before_its_first_part_and_the_parts_are_chunks() -> None:
    go_on = asyncio.Event()

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go_on.wait()
        for part in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def main() -> None:
        async with serving(app) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"transfer-encoding: chunked" in await head_of(reader)
            go_on.set()
            assert await reader.readuntil(b"0\r\n\r\n") == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
            writer.close()

    run(main())


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nx-forged: 1"), (b"x\nx-forged", b"1"), (b"x", b"a\0"), (b"content-length", b"9")]
)
def test_an_answer_with_an_invalid_header_or_a_wrong_content_length_is_not_sent(header: tuple[bytes, bytes]) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [header]})
        await send({"type": "http.response.body", "body": b"four"})

    async def main() -> None:
        async with serving(app) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_an_answer_that_fails_in_the_middle_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise RuntimeError("a bug")

    async def main() -> None:
        async with serving(app) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.read()).endswith(b"3\r\none\r\n")
            writer.close()

    run(main())
    assert "a bug" in caplog.text


def test_a_slow_reader_pauses_the_application_and_a_slow_application_pauses_the_client() -> None:
    part, count = b"x" * 65_536, 500
    received_bytes, begin = 0, asyncio.Event()

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        nonlocal received_bytes
        await begin.wait()
        more = True
        while more:
            message = await receive()
            received_bytes, more = received_bytes + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(count):
            await send({"type": "http.response.body", "body": part, "more_body": number < count - 1})

    async def main() -> None:
        async with serving(app) as (server, port):
            reader, writer = await connect(port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (count * len(part)) + part * count)
            await until(lambda: len(server.server_state.connections) == 1, "the connection")
            protocol = next(iter(server.server_state.connections))
            assert isinstance(protocol, BoundedHttp)
            await until(lambda: protocol.flow.read_paused, "a paused client")
            begin.set()
            await until(lambda: protocol.flow.write_paused, "a paused application")
            assert received_bytes == count * len(part)
            sent_bytes = 0
            while sent_bytes < count * len(part):
                sent_bytes += len(await reader.read(len(part)))
            writer.close()

    run(main())


def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_KEEP_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.1)

    async def main() -> None:
        async with serving(hello) as (_, port):
            reader, writer = await connect(port)
            writer.write(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.read()).endswith(b"/a")
            writer.close()

    run(main())


def test_a_client_that_stops_sending_its_body_gets_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_cycle, "_SILENCE_SECONDS", 0.05)

    async def main() -> None:
        async with gateway() as client:
            reader, writer = await connect(client.base_url.port or 0)
            writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert (await head_of(reader)).startswith(b"http/1.1 408")
            writer.close()

    run(main())


def test_the_rest_of_a_body_that_was_refused_early_is_ignored() -> None:
    async def main() -> None:
        async with gateway(max_request_mb=1) as client:
            reader, writer = await connect(client.base_url.port or 0)
            writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n")
            assert (await head_of(reader)).startswith(b"http/1.1 413")
            writer.write(b" " * 2_000_000 + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"http/1.1 200 ok" in await head_of(reader)
            writer.close()

    run(main())
