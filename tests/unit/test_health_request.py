"""GET requests of the health checks, sent to a real server that answers with prepared bytes."""

import asyncio

import pytest

from sage.llm.control_plane.executors.health_request import get

OK = b"HTTP/1.1 200 OK\r\n"


async def answered(content: bytes, *, closes: bool = True) -> tuple[tuple[int, bytes], bytes]:
    """Return the answer, and the request that the server received."""
    received = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        received = await reader.readuntil(b"\r\n\r\n")
        writer.write(content)
        if closes:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return await get(address, "/health", {"Authorization": "Bearer k"}), received


@pytest.mark.parametrize(
    "content",
    [
        OK + b"Content-Length: 2\r\n\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        OK + b"\r\n{}",
    ],
)
def test_an_answer_with_a_length_or_with_chunks_or_with_neither_is_read(content: bytes) -> None:
    answer, request = asyncio.run(answered(content))
    assert answer == (200, b"{}")
    assert request.startswith(b"GET /health HTTP/1.1\r\n")
    assert b"Authorization: Bearer k\r\n" in request


def test_an_answer_with_a_length_is_complete_even_if_the_connection_stays_open() -> None:
    async def check() -> None:
        async with asyncio.timeout(30):
            answer, _ = await answered(OK + b"content-length: 2\r\n\r\n{}", closes=False)
        assert answer == (200, b"{}")

    asyncio.run(check())


@pytest.mark.parametrize("content", [b"", b"SSH-2.0\r\n", OK + b"Content-Length: 5\r\n\r\n{}", b"x" * 5_000_000])
def test_an_answer_that_is_incomplete_or_too_long_or_not_http_raises_an_oserror(content: bytes) -> None:
    with pytest.raises(OSError, match="the answer of 127"):
        asyncio.run(answered(content))
