"""The gateway reuses its connections to servers, and replaces connections that a server has closed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from gateways import until
from starlette.types import Message

from sage.llm.control_plane.routing import Upstream
from sage.llm.gateway import engine_connections
from sage.llm.gateway.engine_connections import EngineConnections
from sage.llm.gateway.relay import Relay

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 60))  # the gateway runs in this event loop too


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    """Run a server that calls `serve` with each connection and the connection's number. Yields the server's address."""
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer, connections)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def request(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


async def ask(pool: EngineConnections, address: str) -> bytes:
    answer = await pool.post(address, HEAD, [b"{}"])
    try:
        return await answer.read()
    finally:
        pool.release(answer)


@contextlib.asynccontextmanager
async def connections() -> AsyncIterator[EngineConnections]:
    pool = EngineConnections()
    yield pool
    pool.close()


def test_a_thousand_requests_use_one_connection() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            assert await request(reader) == HEAD + b"{}"
            seen.append(number)
            writer.write(OK)

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            for _ in range(1000):
                assert await ask(pool, address) == b"ok"
        assert seen == [1] * 1000

    run(main())


@pytest.mark.parametrize("requests_first", [0, 1])
def test_a_reused_connection_that_the_server_closes_is_replaced(requests_first: int) -> None:
    """With `requests_first=1`, the server closes the connection after it has read the second request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(OK)
        for _ in range(requests_first):
            await request(reader)
        writer.transport.abort()

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            for _ in range(20):
                assert await ask(pool, address) == b"ok"

    run(main())


def test_a_request_is_not_sent_again_if_the_server_closes_a_new_connection() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        seen.append(number)

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            with pytest.raises(ConnectionError):
                await ask(pool, address)
        assert seen == [1]

    run(main())


def test_a_request_is_not_sent_again_once_its_answer_has_begun() -> None:
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(OK)
        await request(reader)
        seen.append(number)
        writer.write(OK[:-1] if len(seen) > 1 else b"HTTP/1.1 2")

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            for _ in range(2):
                await ask(pool, address)
                with pytest.raises(ConnectionError):
                    await ask(pool, address)
        assert seen == [1, 2]

    run(main())


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\nx-trailer: 1\r\n\r\n", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
@pytest.mark.parametrize("piecewise", [True, False])
def test_every_framing_of_an_answer_is_understood(answer: bytes, body: bytes, piecewise: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        for piece in [answer[at : at + 1] for at in range(len(answer))] if piecewise else [answer]:
            writer.write(piece)
            await asyncio.sleep(0)

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            for _ in range(3):
                got = await pool.post(address, HEAD, [b"{}"])
                assert await got.read() == body
                assert all(name != b"link" for name, _ in got.headers)
                pool.release(got)

    run(main())


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n", OK[:-1], b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no"])
def test_an_answer_that_is_incomplete_or_not_http_is_an_error(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(answer)

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            with pytest.raises(ConnectionError):
                await ask(pool, address)

    run(main())


def test_data_that_a_server_sends_without_a_request_is_not_the_next_answer() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong")
        await request(reader)
        writer.write(OK)

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            for _ in range(3):
                assert await ask(pool, address) == b"ok"

    run(main())


def test_an_idle_connection_is_closed_before_the_server_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_connections, "_IDLE_SECONDS", 0.05)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(OK)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        closed.set()

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            assert await ask(pool, address) == b"ok"
            await closed.wait()

    run(main())


def test_an_answer_is_read_from_the_server_only_as_fast_as_it_is_consumed() -> None:
    size_bytes, most_bytes = 16_000_000, 1_000_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size_bytes + b"x" * size_bytes)
        await writer.drain()

    async def main() -> None:
        async with server(serve) as address, connections() as pool:
            answer = await pool.post(address, HEAD, [b"{}"])
            taken_bytes = 0
            while taken_bytes < size_bytes - most_bytes:
                await until(lambda: not answer.transport.is_reading(), "a pause, as nothing was taken")
                piece = await answer.piece()
                assert len(piece) < most_bytes
                taken_bytes += len(piece)
            assert taken_bytes + len(await answer.read()) == size_bytes
            pool.release(answer)

    run(main())


def test_a_slow_client_pauses_the_stream_of_its_engine() -> None:
    event = b'data: {"model": "inner"}\n\n'
    count = 100_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + event * count + b"data: [DONE]\n\n")
        await writer.drain()

    async def main() -> None:
        can_send, sent = asyncio.Event(), bytearray()

        async def send(message: Message) -> None:
            await can_send.wait()
            sent.extend(message.get("body", b""))

        async with server(serve) as address, connections() as pool:
            answer = await pool.post(address, HEAD, [b"{}"])
            relay = asyncio.create_task(Relay(Upstream(address, "inner", "engine-a", "tiny"), send).forward(answer))
            await until(lambda: not answer.transport.is_reading(), "a pause")
            can_send.set()
            await relay
            pool.release(answer)
        assert sent == event.replace(b"inner", b"tiny") * count + b"data: [DONE]\n\n"

    run(main())
