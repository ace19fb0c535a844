"""The limits of client connections, tested with raw sockets."""

import asyncio
import json
import resource
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
import uvloop
from gateways import gateway

from sage.llm.gateway import connections
from sage.llm.gateway.connections import BoundedHttp, connection_limit


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 60))  # the gateway also uses uvloop


async def connect(client: httpx.AsyncClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(client.base_url.host, client.base_url.port)


async def exchange(client: httpx.AsyncClient, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes, and read until the gateway closes the connection. Return the status and the error."""
    reader, writer = await connect(client)
    writer.write(sent)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_head_that_is_too_long_is_a_431_and_invalid_http_is_a_400() -> None:
    async def main() -> None:
        async with gateway() as client:
            for head in (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 300_000, b"GET /" + b"a" * 300_000,
                         b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n"):  # fmt: skip
                assert (await exchange(client, head))[1]["code"] == "headers_too_large"
            status, error = await exchange(client, b"no http at all\r\n\r\n")
            assert (status, error["code"]) == (400, "invalid_http")
            long_but_allowed = {"X-Long": "a" * 30_000}
            assert (await client.get("/health", headers=long_but_allowed)).status_code == 200

    run(main())


def test_clients_beyond_the_limit_get_a_503_and_the_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttp, "limit", 3)

    async def main() -> None:
        async with gateway() as client:
            assert (await client.get("/health")).status_code == 200  # the client keeps its connection open
            others = [await connect(client) for _ in range(2)]
            status, error = await exchange(client, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert (status, error["code"]) == (503, "too_many_connections")
            assert (await client.get("/health")).status_code == 200
            for _, writer in others:
                writer.close()
                await writer.wait_closed()
            async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as late:
                async with asyncio.timeout(20):
                    while (await late.get("/health")).status_code != 200:
                        await asyncio.sleep(0.01)

    run(main())


def test_a_connection_is_closed_if_the_head_is_incomplete_but_not_if_the_body_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.1)

    async def main() -> None:
        async with gateway() as client:
            slow_reader, slow = await connect(client)
            slow.write(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: 13\r\n\r\n{"
            )
            for beginning in (
                b"",
                b"GET /health HTTP/1.1\r\nX: ",
                b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he",
            ):
                reader, writer = await connect(client)
                writer.write(beginning)
                async with asyncio.timeout(20):
                    await reader.read()  # until the gateway closes the connection
                writer.close()
            slow.write(b'"model": ""}')
            assert (await slow_reader.read()).startswith(b"HTTP/1.1 400")
            slow.close()

    run(main())


@pytest.mark.parametrize(("descriptors", "clients"), [(80, 12), (1024, 484), (20, 4), (resource.RLIM_INFINITY, 32740)])
def test_the_limit_of_clients_follows_from_the_limit_of_descriptors(
    descriptors: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, descriptors))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits[0]))
    assert connection_limit() == clients
    assert raised == [65_536 if descriptors == resource.RLIM_INFINITY else descriptors]
