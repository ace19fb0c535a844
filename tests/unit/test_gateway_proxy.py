"""The gateway forwards requests and answers, and reports errors if the engine exits, hangs or closes connections."""

import asyncio
import gzip
import json
from collections.abc import Coroutine
from typing import Any

import httpx
import psutil
import pytest
import uvloop
from aiohttp import web
from gateways import ASK, CHAT, engine, gateway, until

from sage.common.errors import EngineError, GatewayUnreachable
from sage.llm.client import AsyncSageClient
from sage.llm.client.answers import unreachable
from sage.llm.client.streams import ChatReader

EVENT = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 60))  # the gateway runs in this event loop too


async def stream_of(request: web.Request, *pieces: bytes, **headers: str) -> web.StreamResponse:
    """Begin a stream of server-sent events."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
    await answer.prepare(request)
    for piece in pieces:
        await answer.write(piece)
    return answer


def cut(request: web.Request) -> None:
    """Abort the connection, as if the process had been killed."""
    assert request.transport
    request.transport.abort()


def test_a_parameter_that_a_server_would_ignore_is_a_400_that_names_it() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(await request.json())

    async def main() -> None:
        async with engine(answer) as port, gateway(port, parameters=frozenset({"model", "messages"})) as client:
            assert (await client.post(CHAT, json={**ASK, "frob": None})).status_code == 200
            refused = await client.post(CHAT, json={**ASK, "frob": 1})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_value", "frob")
            assert error["message"] == "frob is not supported by this engine. Remove this field."

    run(main())


def test_the_query_the_body_and_most_headers_reach_the_engine_unchanged() -> None:
    seen: dict[str, Any] = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(path=request.path_qs, headers=request.headers, body=await request.read())
        headers = {"x-request-id": "from-engine", "Retry-After": "7", "X-Model": "tiny", "Set-Cookie": "a=b"}
        return web.json_response({"detail": "later"}, status=429, headers=headers)

    async def main() -> None:
        async with engine(answer) as port, gateway(port, key="inner") as client:
            sent = json.dumps(ASK, indent=3).encode()
            got = await client.post(
                f"{CHAT}?version=2%2F1&x=a%20b", content=sent,
                headers={
                    "Content-Type": "application/json; charset=utf-8", "X-Title": "Grüße".encode(), "traceparent": "00-ab",
                    "User-Agent": "mine/1", "Authorization": "Bearer theirs", "Cookie": "c=d", "Connection": "x-hop",
                    "X-Hop": "1", "Accept-Encoding": "gzip",
                },
            )  # fmt: skip
            assert seen["body"] == sent
            assert seen["path"] == f"{CHAT}?version=2%2F1&x=a%20b"
            passed = seen["headers"]
            assert (passed["traceparent"], passed["User-Agent"], passed["X-Title"]) == ("00-ab", "mine/1", "Grüße")
            assert passed["Content-Type"] == "application/json; charset=utf-8"
            assert passed["X-Request-Id"] == "from-engine" or passed["X-Request-Id"].startswith("req-")
            assert not {"Cookie", "X-Hop"} & set(passed)
            assert passed.getall("Authorization") == ["Bearer inner"]  # the server's key, not the client's
            assert (got.status_code, got.json()) == (429, {"detail": "later"})
            assert (got.headers["retry-after"], got.headers["x-model"]) == ("7", "tiny")
            assert got.headers.get_list("x-request-id") == ["from-engine"]

    run(main())


@pytest.mark.parametrize("padding", ["", "long " * 300_000])
@pytest.mark.parametrize("inner_name", ["sage-abc-1", "tiny", None])
def test_the_server_gets_its_own_model_name_and_the_client_gets_the_public_name(
    padding: str, inner_name: str | None
) -> None:
    seen: dict[str, Any] = {}
    asked = 'an "alias"'

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        assert request.content_length == len(body)
        seen.update(json.loads(body))
        choice = {"arguments": {"model": "not this"}, "text": 'say "model": "x"'}
        if not seen["stream"]:
            return web.json_response({"choices": [choice], "model": seen["model"]})
        head, tail = json.dumps({"model": seen["model"], "choices": [choice]}).encode().split(b'"choices"')
        stream = await stream_of(request, b"data: " + head)  # the first part of a line
        await stream.write(b'"choices"' + tail + b"\n\ndata: [DONE]\n\n")
        return stream

    async def main() -> None:
        async with engine(answer) as port, gateway(port, model_name=inner_name) as client:
            for streams in (False, True):
                messages = [{"role": "user", "content": f"Grüße{padding}"}]
                sent = {"seed": 2**70, "messages": messages, "stream": streams, "model": asked}
                got = await client.post(CHAT, json=sent)
                assert seen == {**sent, "model": inner_name or asked}
                answered = json.loads(got.text.removeprefix("data: ").removesuffix("\n\ndata: [DONE]\n\n"))
                assert answered["model"] == "tiny"
                assert answered["choices"][0] == {"arguments": {"model": "not this"}, "text": 'say "model": "x"'}
                assert got.headers["x-sage-engine-id"] == "engine-a"

    run(main())


def test_a_body_is_forwarded_unchanged_if_the_server_uses_the_public_model_name() -> None:
    seen: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(await request.read())
        return web.json_response({})

    async def main() -> None:
        body = json.dumps(ASK, indent=5).encode()
        async with engine(answer) as port, gateway(port, model_name="tiny") as client:
            await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert seen == [body]

    run(main())


def test_requests_beyond_an_engine_s_limit_get_a_429_that_says_when_to_retry() -> None:
    waiting, go_on = 0, asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        await go_on.wait()
        return web.json_response({})

    async def main() -> None:
        async with engine(answer) as port, gateway(port, max_engine_requests=2) as client:
            accepted = [asyncio.create_task(client.post(CHAT, json=ASK)) for _ in range(2)]
            await until(lambda: waiting == 2, "the requests at the engine")
            got = await client.post(CHAT, json=ASK)
            assert (got.status_code, got.json()["error"]["code"]) == (429, "engine_busy")
            assert got.json()["error"]["type"] == "rate_limit_error"
            assert int(got.headers["retry-after"]) > 0
            go_on.set()
            assert [(await task).status_code for task in accepted] == [200, 200]
            assert (await client.post(CHAT, json=ASK)).status_code == 200

    run(main())


def test_a_body_that_comes_in_chunks_after_a_100_continue_reaches_the_engine_whole() -> None:
    seen: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        assert "expect" not in request.headers
        seen.append(await request.read())
        return web.json_response({})

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writer.write(
                f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            body = json.dumps(ASK).encode()
            for piece in (body[:7], body[7:], b""):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
            writer.close()
            assert seen == [body]

    run(main())


def test_a_request_is_cancelled_if_its_client_disconnects_while_the_engine_is_starting() -> None:
    async def main() -> None:
        async with gateway() as client:
            waiting, ended = asyncio.Event(), asyncio.Event()

            async def running(*_: object) -> None:
                waiting.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()

            client.app.state.manager.running = running  # type: ignore[attr-defined]
            asking = asyncio.create_task(client.post(CHAT, json=ASK))
            await waiting.wait()
            asking.cancel()
            await ended.wait()

    run(main())


def test_a_compressed_answer_arrives_with_its_encoding() -> None:
    async def answer(_: web.Request) -> web.Response:
        body = gzip.compress(b'{"text": "Hello"}')
        return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            got = await client.post(CHAT, json=ASK)
            assert got.headers["content-encoding"] == "gzip"
            assert got.json() == {"text": "Hello"}

    run(main())


def test_a_stream_arrives_piece_by_piece_and_unchanged() -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = await stream_of(request, EVENT, **{"x-model": "tiny"})
        await go_on.wait()
        await stream.write(b'data: {"half"')
        await stream.write(b": 1}\n\ndata: [DONE]\n\n")
        return stream

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client, client.stream("POST", CHAT, json=ASK) as got:
            assert got.headers["x-model"] == "tiny"
            assert got.headers["content-type"] == "text/event-stream"
            pieces = got.aiter_bytes()
            first = await anext(pieces)
            assert first == EVENT
            go_on.set()
            assert b"".join([piece async for piece in pieces]) == b'data: {"half": 1}\n\ndata: [DONE]\n\n'

    run(main())


@pytest.mark.parametrize("torn", [b"", b'data: {"choices": [{"del', b'data: {"choices": []}\n'])
@pytest.mark.parametrize("cleanly", [True, False])
def test_an_engine_that_dies_in_mid_stream_is_named_in_an_error_event(torn: bytes, cleanly: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        stream = await stream_of(request, EVENT, torn)
        if not cleanly:
            cut(request)
        return stream

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            text = (await client.post(CHAT, json=ASK)).text
            assert "[DONE]" not in text
            events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
            error = events[-1]["error"]
            assert error["code"] == "engine_died"
            assert "engine-a ('tiny')" in error["message"]
            async with AsyncSageClient(str(client.base_url)) as ours:
                with pytest.raises(EngineError, match="engine-a") as told:
                    _ = [piece async for piece in ours.chat_stream("tiny", ASK["messages"])]
                assert (told.value.code, told.value.exit_code) == ("engine_died", 1)

    run(main())


def test_an_error_event_of_the_engine_is_forwarded_unchanged() -> None:
    error = b'data: {"error": {"message": "no memory", "type": "api_error", "param": null, "code": "oom"}}\n\n'

    async def answer(request: web.Request) -> web.StreamResponse:
        return await stream_of(request, EVENT, error)

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            assert (await client.post(CHAT, json=ASK)).content == EVENT + error

    run(main())


def test_an_engine_that_dies_before_it_answers_is_a_502_that_names_it() -> None:
    async def answer(request: web.Request) -> web.Response:
        cut(request)
        return web.Response()

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            got = await client.post(CHAT, json=ASK)
            assert (got.status_code, got.json()["error"]["code"]) == (502, "engine_died")
            assert "engine-a" in got.json()["error"]["message"]
        async with gateway(port) as client:  # no server listens on this port now
            got = await client.post(CHAT, json=ASK)
            assert (got.status_code, got.json()["error"]["code"]) == (502, "engine_died")

    run(main())


def test_no_request_is_lost_if_the_engine_closes_idle_connections() -> None:
    answered: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        answered.append(str(request.transport.get_extra_info("peername")) if request.transport else "")
        if answered[-1] in answered[:-1]:
            cut(request)  # as if the connection had been closed while the request was under way
        return web.json_response({})

    async def main() -> None:
        async with engine(answer, keep_alive_seconds=0.05) as port, gateway(port) as client:
            for _ in range(20):
                assert (await client.post(CHAT, json=ASK)).status_code == 200
        assert len(set(answered)) == 20

    run(main())


def test_a_disconnect_cancels_the_engine_s_work_and_closes_all_descriptors() -> None:
    begun, ended = 0, 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal begun, ended
        begun += 1
        try:
            streams = "stream" in await request.json()
            stream = await stream_of(request, EVENT) if streams else web.Response()
            await asyncio.sleep(60)
            return stream
        finally:
            ended += 1

    async def leave(client: httpx.AsyncClient, options: dict[str, Any]) -> None:
        before = begun
        asking = asyncio.create_task(client.post(CHAT, json={**ASK, **options}))
        await until(lambda: begun > before, "the request at the engine")
        asking.cancel()

    async def main() -> None:
        async with engine(answer) as port, gateway(port) as client:
            await leave(client, {})
            await until(lambda: ended == 1, "the end of the work")
            descriptors = psutil.Process().num_fds()
            for number in range(1, 40):
                await leave(client, {"stream": True} if number % 2 else {})
            await until(lambda: ended == 40, "the end of all work")
            await until(lambda: psutil.Process().num_fds() <= descriptors + 2, "as many descriptors as before")

    run(main())


@pytest.mark.parametrize("streams", [True, False])
def test_a_hung_engine_causes_a_503_or_an_error_event(streams: bool) -> None:
    begun = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if streams:
            await stream_of(request, EVENT)
        begun.set()
        await asyncio.sleep(60)
        return web.Response()

    async def main() -> None:
        async with engine(answer) as port, gateway(port, lambda: not begun.is_set()) as client:
            got = await client.post(CHAT, json=ASK)
            if streams:
                assert got.text.startswith(EVENT.decode())
                assert '"engine_unresponsive"' in got.text
            else:
                assert (got.status_code, got.json()["error"]["code"]) == (503, "engine_unresponsive")
                assert int(got.headers["retry-after"]) > 0

    run(main())


def test_our_client_raises_an_error_if_a_stream_is_incomplete() -> None:
    stream = ChatReader()
    assert stream.feed(b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n') == ["Hi"]
    assert stream.feed(b'\ndata: {"choices": []}\n') == []
    with pytest.raises(EngineError, match="before it was complete"):
        stream.finish()
    assert stream.feed(b"data: [DONE]\n") == []
    stream.finish()


def test_the_hint_for_a_late_answer_is_to_list_the_engines() -> None:
    late = unreachable("http://127.0.0.1:1", httpx.ReadTimeout("late"))
    assert isinstance(late, GatewayUnreachable)
    assert "sage llm engine list" in late.hint
