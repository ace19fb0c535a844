"""The middleware before all routes: checks access, body size and JSON, sets request ids, reports unexpected errors."""

import asyncio
import json
import logging
import re
import secrets
from types import TracebackType
from typing import Any, NoReturn, Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage.common.errors import ConfigError, Overloaded, SageError
from sage.common.settings import Settings
from sage.llm.client.types import DEFAULT_MODEL
from sage.llm.gateway.access import check_access, key_of
from sage.llm.gateway.errors import Refusal, error_response, out_of_descriptors
from sage.llm.gateway.schema import MAX_MODEL_CHARS

logger = logging.getLogger(__name__)
#: Key of the parsed body in a request's scope.
JSON_BODY = "sage.json_body"
#: Larger bodies are parsed in a thread.
LARGE_BYTES = 1_000_000
_MAX_DEPTH = 100
#: All bodies held at once, as a multiple of the largest one allowed.
_HELD_BODIES = 8
#: A client that sends nothing for this long has lost its connection.
_SILENCE_SECONDS = 60
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_LOGGED_CHARS = 200
#: HEAD requests for these paths are not changed to GET: a stream may never end.
_STREAMS = ("/logs", "/events")


class Gate:
    """Checks access and body, gives the request an id, and reports unexpected errors."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._key = app, key_of(settings)
        self._budget = BodyBudget(settings.max_request_mb * 1_000_000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the routes, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            await self._forward(scope, receive, answer)
        except ClientDisconnect:
            return
        except SageError as error:
            await answer.fail(error, receive)
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            await answer.fail(_unexpected(error, answer), receive)

    async def _forward(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        headers = Headers(scope=scope)
        check_access(scope["path"], headers, self._key)
        if scope["method"] == "HEAD" and not scope["path"].endswith(_STREAMS):
            scope = {**scope, "method": "GET"}  # the server omits the body
        with self._budget.body() as body:
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                await body.read(headers, receive)
                if body.content:
                    _check_type(headers)
                    scope[JSON_BODY] = await parsed(body.content)
                receive = _replayed(body.content, receive)
            await self._app(scope, receive, answer.send)


class _Answer:
    """The answer to one request; it carries the request's id."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        scope["headers"] = [*others, (b"x-request-id", self.request_id.encode())]
        self._scope, self._send, self.has_begun = scope, send, False

    @property
    def request(self) -> str:
        """The request's method, path and id, for the log."""
        return f"{self._scope['method']} {self._scope['path'][:_LOGGED_CHARS]!r} ({self.request_id})"

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            MutableHeaders(scope=message).setdefault("x-request-id", self.request_id)
            is_read = self._scope["method"] in ("GET", "HEAD") and message["status"] < 500  # many: clients poll
            logger.log(logging.DEBUG if is_read else logging.INFO, "%s: %d", self.request, message["status"])
        await self._send(message)

    async def fail(self, error: SageError, receive: Receive) -> None:
        """Answer with an error; if an answer has begun, break it off, so that the client notices."""
        if self.has_begun:
            raise error
        await error_response(error)(self._scope, receive, self.send)


def _unexpected(error: Exception, answer: _Answer) -> SageError:
    if overloaded := out_of_descriptors(error):
        return overloaded
    logger.error("%s failed", answer.request, exc_info=error)
    message = f"The gateway failed ({type(error).__name__}); `sage gateway logs` says more under {answer.request_id}."
    return SageError(code="internal_error", message=message)


def _check_type(headers: Headers) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"The body's Content-Type is {media_type[:100] or 'missing'}; it must be application/json."
        raise Refusal(415, "unsupported_media_type", message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first yields a body that was read already, then the messages after it."""
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def requested_model(scope: Scope) -> str:
    """Return the `model` that a request's body names. Raises Refusal if it has no body, ConfigError if it names none."""
    if JSON_BODY not in scope:
        raise Refusal(400, "invalid_json", "The body is empty.", "Send a JSON object.")
    content = scope[JSON_BODY]
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARS:
        message = f"'model' is required and must be text of 1 to {MAX_MODEL_CHARS} characters."
        hint = f"'{DEFAULT_MODEL}' means the engine that was started last."
        raise ConfigError(code="model_required", message=message, hint=hint, param="model")
    return model


class BodyBudget:
    """The memory for request bodies, shared by all requests."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: largest body allowed."""
        self.max_bytes = max_bytes
        self.left_bytes = _HELD_BODIES * max_bytes

    def body(self) -> "Body":
        """Return an empty body; the end of its `with` block releases its memory."""
        return Body(self)


class Body:
    """One request's body, within the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held_bytes = budget, 0
        self.content = b""

    def __enter__(self) -> Self:
        """Begin with nothing."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Release the memory."""
        self._budget.left_bytes += self._held_bytes
        self._held_bytes = 0

    async def read(self, headers: Headers, receive: Receive) -> None:
        """Read the whole body. Raises Refusal (too large, too slow), Overloaded, or ClientDisconnect."""
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._budget.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        more = True
        while more:
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await receive()
            except TimeoutError as error:
                text = f"No byte of the body arrived for {_SILENCE_SECONDS} s."
                raise Refusal(408, "request_timeout", text) from error
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            self._hold(len(chunks[-1]))
            more = message.get("more_body", False)
        self.content = b"".join(chunks)

    def _hold(self, count_bytes: int) -> None:
        if self._held_bytes + count_bytes > self._budget.max_bytes:
            raise self._too_large()
        if count_bytes > self._budget.left_bytes:
            raise Overloaded(code="too_many_requests", message="Other requests with large bodies are being answered.",
                             hint="Retry in some seconds.")  # fmt: skip
        self._held_bytes += count_bytes
        self._budget.left_bytes -= count_bytes

    def _too_large(self) -> Refusal:
        limit_mb = self._budget.max_bytes // 1_000_000
        return Refusal(413, "request_too_large", f"The body is larger than {limit_mb} MB.",
                       "Send less, or raise the setting max_request_mb.")  # fmt: skip


async def parsed(body: bytes) -> Any:
    """Return the content of a JSON body, parsed in a thread if it is large. Raises Refusal as `_parse` does."""
    return await asyncio.to_thread(_parse, body) if len(body) > LARGE_BYTES else _parse(body)


def _parse(body: bytes) -> Any:
    """Raises Refusal if it is not JSON, nested too deeply, or holds half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text = body.decode()
        content = json.loads(text, parse_constant=_no_number)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeEncodeError as error:
        message = "The body holds half of a surrogate pair (a broken emoji, for example)."
        raise Refusal(400, "invalid_unicode", message, "Send both halves, or none.") from error
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if _is_deeper(content, _MAX_DEPTH):
        raise _too_deep()
    return content


def _too_deep() -> Refusal:
    return Refusal(400, "json_too_deep", f"The body is nested more than {_MAX_DEPTH} levels deep.")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_deeper(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit + 1):
        level = [
            child
            for parent in level if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent) if isinstance(child, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True
