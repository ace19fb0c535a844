"""Run vLLM's OpenAI server on an inherited socket: `python vllm_server.py --fd N`, followed by vLLM's options.

This script runs in vLLM's environment, where SAGE is not installed. The server differs from vLLM's own server:

- It listens on the socket that it inherits, and rejects requests from web pages of other sites.
- Unknown parameters are rejected with status 400 (vLLM's own server ignores them).
- Error codes are words, as in OpenAI's API.
- An adapter is rejected if its tokenizer or chat template differs from the base model's.
- `/health` returns the value of SAGE_ENGINE_ID, the context length, the number of slots, and the token counts of each model.
- `/sleep`, `/wake_up` and `/is_sleeping` work as in vLLM's development mode, and need the server's key. Other routes of the
  development mode are not available: through them, clients could call any method of vLLM.
"""

import hmac
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: OpenAI's parameters that do not change this server's answers.
_IGNORED = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "user"}
_LOAD = "/v1/load_lora_adapter"
_SLEEP_METHODS = {"/sleep": "POST", "/wake_up": "POST", "/is_sleeping": "GET"}
_CODES = {400: "invalid_value", 404: "model_not_found", 500: "internal_error", 503: "engine_stopping"}


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    return str(template) if template else None


def _vocabulary(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_bytes()) if file.is_file() else None
    return content and [content.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


#: Keys: the names that messages use for parts of a model. Values: functions that read the part from a model's folder. If the
#: folder of an adapter has such a part, the part must be equal to the base model's part.
_VOICE: dict[str, Callable[[Path], Any]] = {"chat template": _template, "tokenizer": _vocabulary}


class Rules:
    """Middleware that checks requests before vLLM receives them, and replaces the codes of vLLM's errors."""

    #: Keys: paths of requests. Values: the parameters that vLLM supports in requests to this path.
    known: ClassVar[Mapping[str, Collection[str]]] = {}

    def __init__(self, app: App) -> None:
        self._app = app
        self._counts: TokenCounts | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forward a request to vLLM, answer the request without vLLM, or reject the request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._counts is None:
            self._counts = TokenCounts(scope["app"].state)
        if not _is_from_this_machine(dict(scope["headers"])):
            await _send_error(send, 403, "Requests from other sites or hosts are rejected.", "origin_not_allowed")
        elif scope["path"] == "/health":
            await self._app(scope, receive, _Health(send, scope["app"].state, self._counts))
        elif scope["path"] in _SLEEP_METHODS:
            await _sleep(scope, send)
        elif scope["path"] == _LOAD:
            await self._load(scope, receive, send)
        elif (known := self.known.get(scope["path"])) is None:
            await self._app(scope, receive, _WithCodes(send))
        else:
            body = await _read(receive)
            if unknown := _unknown(body, known):
                message = f"{unknown}: this parameter is not supported by vLLM."
                await _send_error(send, 400, message, "unsupported_value", unknown)
            else:
                await self._app(scope, _Replay(body, receive), _WithCodes(send))

    async def _load(self, scope: Message, receive: Receive, send: Send) -> None:
        """Load an adapter, or reject it if its tokenizer or template differs from the base model's.

        vLLM uses the base model's tokenizer and template for all adapters.
        """
        body = await _read(receive)
        try:
            adapter, base = Path(json.loads(body)["lora_path"]), Path(scope["app"].state.vllm_config.model_config.model)
            name = next((name for name, read in _VOICE.items() if read(adapter) not in (None, read(base))), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            await _send_error(send, 400, f"The adapter cannot be read: {error!r}.", "invalid_value", "lora_path")
            return
        if name:
            await _send_error(send, 400, f"The adapter's {name} differs from the base model's.", "adapter_not_hot")
        else:
            await self._app(scope, _Replay(body, receive), _WithCodes(send, is_refusal=True))


async def _sleep(scope: Message, send: Send) -> None:
    """Answer a request to `/sleep` (release the engine's memory), `/wake_up` (allocate memory again) or `/is_sleeping`."""
    given, key = dict(scope["headers"]).get(b"authorization", b""), os.environ.get("SAGE_SERVER_KEY", "")
    if not key or not hmac.compare_digest(given, f"Bearer {key}".encode()):
        await _send_error(send, 401, "The server key in the request is missing or wrong.", "invalid_api_key")
        return
    if scope["method"] != _SLEEP_METHODS[scope["path"]]:
        await _send_error(send, 405, "This HTTP method is not allowed.", "method_not_allowed")
        return
    engine, query = scope["app"].state.engine_client, parse_qs(scope["query_string"].decode())
    if scope["path"] == "/sleep":
        level = int(query.get("level", ["1"])[0])
        await engine.sleep(level, query.get("mode", ["abort"])[0])
        await _send_json(send, 200, {"status": "sleeping", "level": level})
    elif scope["path"] == "/wake_up":
        is_awake = await engine.wake_up(None)
        await _send_json(send, 200, {"status": "awake" if is_awake else "sleeping", "tags": None})
    else:
        await _send_json(send, 200, {"is_sleeping": await engine.is_sleeping()})


class TokenCounts:
    """Counts the tokens of each model. All routes call `generate` of vLLM's engine client, so this method is replaced."""

    def __init__(self, state: Any) -> None:
        """Replace `generate` of the engine client.  state: the state of vLLM's application."""
        self._base_name = state.vllm_config.model_config.served_model_name
        #: Keys: names of models in requests. Values: the number of prompt tokens, and the number of answer tokens.
        self.by_model: dict[str, list[int]] = {self._base_name: [0, 0]}
        self._generate, state.engine_client.generate = state.engine_client.generate, self._counted

    async def _counted(
        self, prompt: Any, sampling: Any, *arguments: Any, lora_request: Any = None, **options: Any
    ) -> AsyncIterator[Any]:
        prompt_tokens, answers = 0, Counter[int]()
        is_delta = sampling.output_kind.name == "DELTA"  # False: each output contains all tokens of the answer so far
        generated = self._generate(prompt, sampling, *arguments, lora_request=lora_request, **options)
        try:
            async with aclosing(generated):
                async for output in generated:
                    prompt_tokens = len(output.prompt_token_ids or ()) or prompt_tokens
                    for answer in output.outputs:
                        earlier = answers[answer.index] if is_delta else 0
                        answers[answer.index] = earlier + len(answer.token_ids)
                    yield output
        finally:
            counts = self.by_model.setdefault(lora_request.lora_name if lora_request else self._base_name, [0, 0])
            counts[0] += prompt_tokens
            counts[1] += answers.total()


class _Replay:
    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Health:
    def __init__(self, send: Send, state: Any, counts: TokenCounts) -> None:
        self._send, self._state, self._counts = send, state, counts

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            config = self._state.vllm_config
            facts = {
                "status": "ok",
                "engine": os.environ.get("SAGE_ENGINE_ID"),
                "pid": os.getpid(),
                "context_tokens": config.model_config.max_model_len,
                "slots": config.scheduler_config.max_num_seqs,
                "tokens": self._counts.by_model,
            }
            await _send_json(self._send, 200, facts)
        elif message["type"] == "http.response.start":
            await _send_json(self._send, message["status"], {"status": "stopped"})


class _WithCodes:
    """An ASGI send function that replaces vLLM's numeric error codes with words.

    is_refusal: whether the status of every error is replaced with 400.
    """

    def __init__(self, send: Send, *, is_refusal: bool = False) -> None:
        self._send, self._start, self._body = send, {"status": 200}, b""
        self._is_refusal = is_refusal

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = dict(message)
        elif self._start["status"] < 400 or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error()

    async def _send_error(self) -> None:
        status = 400 if self._is_refusal else self._start["status"]
        try:
            error = dict(json.loads(self._body)["error"])
        except (ValueError, KeyError, TypeError):
            error = {"message": self._body.decode(errors="replace")}
        code = _CODES.get(status, "engine_error")
        if status == 400 and "context length" in str(error.get("message")):
            code = "context_length_exceeded"
        await _send_error(self._send, status, str(error.get("message")), code, error.get("param"))


async def _send_error(send: Send, status: int, message: str, code: str, param: str | None = None) -> None:
    kind = "invalid_request_error" if status < 500 else "api_error"
    await _send_json(send, status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


async def _send_json(send: Send, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes:
    body, is_complete = bytearray(), False
    while not is_complete:
        message = await receive()
        body += message.get("body", b"")
        is_complete = not message.get("more_body")
    return bytes(body)


def _unknown(body: bytes, known: Collection[str]) -> str | None:
    try:
        request = json.loads(body)
    except ValueError:
        return None  # vLLM itself rejects a body that is not JSON
    given = request.items() if isinstance(request, dict) else ()
    return next((name for name, value in given if value is not None and name not in known and name not in _IGNORED), None)


def _is_from_this_machine(headers: dict[bytes, bytes]) -> bool:
    urls = [b"//" + headers.get(b"host", b""), headers.get(b"origin", b"//localhost")]
    try:
        return all(urlsplit(url.decode()).hostname in _LOOPBACK for url in urls)
    except ValueError:
        return False


def main() -> None:
    """Run the server."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    given = make_arg_parser(parser).parse_args()
    Rules.known = {
        "/v1/chat/completions": set(ChatCompletionRequest.model_fields),
        "/v1/completions": set(CompletionRequest.model_fields),
    }
    given.middleware = [*given.middleware, f"{__name__}.Rules"]
    configure_logging_from_args(given)
    validate_parsed_serve_args(given)
    # Until vLLM sets its own handler, SIGTERM raises KeyboardInterrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvloop.run(run_server_worker(f"http://127.0.0.1:{given.port}", socket.socket(fileno=given.fd), given))


if __name__ == "__main__":
    main()
