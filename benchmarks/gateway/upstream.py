"""The upstream of the benchmark: a server that returns a fixed chat completion, streamed if `stream` is true.

`upstream.py PORT DELAY_MS ENGINE_ID` answers health checks as the engine ENGINE_ID. If nginx is installed, nginx is used
instead of this server for the cases that have no delay and no stream.
"""

import asyncio
import json
import sys

import httptools
import uvloop

#: Name of the model at this server.
INNER_NAME = "sage-inner-1"
_TEXT = "The capital of France is Paris, which lies on the Seine and has been the capital for most of its history."
EVENTS = 32
ANSWER = json.dumps({
    "id": "chatcmpl-0123456789abcdef", "object": "chat.completion", "created": 1767225600, "model": INNER_NAME,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": _TEXT}, "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 32, "completion_tokens": 24, "total_tokens": 56},
})  # fmt: skip


def health(engine_id: str) -> str:
    """Return the answer to a health check."""
    return json.dumps({"status": "ok", "engine": engine_id})


def _event(number: int) -> bytes:
    content = json.dumps({
        "id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1767225600, "model": INNER_NAME,
        "choices": [{"index": 0, "delta": {"content": f" word{number}"}, "logprobs": None, "finish_reason": None}],
    })  # fmt: skip
    return f"data: {content}\n\n".encode()


def _whole(content: str) -> bytes:
    body = content.encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_STREAM = [*map(_chunk, map(_event, range(EVENTS))), _chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]


class _Connection(asyncio.Protocol):
    def __init__(self, delay_seconds: float, engine_id: str) -> None:
        self._delay_seconds, self._health = delay_seconds, _whole(health(engine_id))
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._path, self._body_tail = b"", b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body_tail = url, b""

    def on_body(self, body: bytes) -> None:
        # Keep only the end of the body: the benchmark's requests have `stream` as their last member.
        self._body_tail = (self._body_tail + body)[-200:]

    def on_message_complete(self) -> None:
        if self._path == b"/health":
            self._transport.write(self._health)
        elif b'"stream": true' in self._body_tail or b'"stream":true' in self._body_tail:
            self._transport.write(_STREAM_HEAD)
            self._loop.call_soon(self._stream, 0)
        elif self._delay_seconds:
            self._loop.call_later(self._delay_seconds, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)

    def _stream(self, number: int) -> None:
        """Write one event in each iteration of the event loop, so that each event is sent separately."""
        if not self._transport.is_closing():
            self._transport.write(_STREAM[number])
            if number + 1 < len(_STREAM):
                self._loop.call_soon(self._stream, number + 1)


_ANSWER = _whole(ANSWER)


async def _serve(port: int, delay_ms: float, engine_id: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(delay_ms / 1000, engine_id), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
