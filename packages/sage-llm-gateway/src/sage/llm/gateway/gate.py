"""Middleware in front of all routes: checks access and bodies, sets request ids, and reports unexpected errors."""

import logging
import random
import re
import time
from typing import Any, Self

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage.common.errors import SageError
from sage.common.settings import Settings
from sage.llm.gateway.access import check_access, key_of
from sage.llm.gateway.bodies import BodyBudget
from sage.llm.gateway.errors import Refusal, error_response, out_of_descriptors
from sage.llm.gateway.json_text import JsonBody, parsed
from sage.llm.gateway.proxy import EngineProxy, is_inference

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_LOGGED_CHARS = 200
#: Methods of requests whose body is ignored.
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
#: Path suffixes of streams. A HEAD request for a stream is not handled like GET, because a stream can continue forever.
_STREAMS = ("/logs", "/events")


#: Attributes that all log records of one level share. `_READ`: level DEBUG. `_WRITE`: level INFO.
_READ, _WRITE = (
    vars(logging.LogRecord(logger.name, level, __file__, 0, "", (), None)) for level in (logging.DEBUG, logging.INFO)
)


class Gate:
    """Checks a request's access and body, sets its id, and reports unexpected errors.

    The proxy answers inference requests, and the application answers all others.
    """

    _app: ASGIApp

    def __init__(self, settings: Settings, proxy: EngineProxy) -> None:
        self._proxy, self._key = proxy, key_of(settings)
        self._budget = BodyBudget(settings.max_request_mb * 1_000_000)

    def in_front_of(self, app: ASGIApp) -> Self:
        """Put the gate in front of an application, and return the gate as the middleware for Starlette."""
        self._app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then forward it to the proxy or the application. After an exception, answer with an error."""
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
        except Exception as error:  # noqa: BLE001 - no other code handles unexpected errors
            await answer.fail(_unexpected(error, answer), receive)

    async def _forward(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        method, path, headers = scope["method"], scope["path"], scope["headers"]
        check_access(path, headers, self._key)
        if method == "HEAD" and not path.endswith(_STREAMS):
            scope = {**scope, "method": "GET"}  # RequestCycle omits the body of an answer to HEAD
        with self._budget.body() as body:
            checked: JsonBody | None = None
            if method not in _READS:
                await body.read(answer.known.get(b"content-length", b""), receive)
                if body.content:
                    _check_type(answer.known.get(b"content-type", b""))
                    checked = await parsed(body.content)
            if is_inference(scope):
                await self._proxy.forward(checked, scope, receive, answer.send)
            else:
                is_read = method in _READS
                await self._app(scope, receive if is_read else _replayed(body.content, receive), answer.send)


class _Answer:
    def __init__(self, scope: Scope, send: Send) -> None:
        headers = scope["headers"]
        self.known: dict[bytes, bytes] = dict(headers)
        self._id = self.known.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(self._id):
            self._id = b"req-%024x" % random.getrandbits(96)  # an id must be unique, but is not secret
            others = [header for header in headers if header[0] != b"x-request-id"]
            scope["headers"] = [*others, (b"x-request-id", self._id)]
        self._scope, self._send, self.has_begun = scope, send, False

    @property
    def request_id(self) -> str:
        return self._id.decode()

    @property
    def request(self) -> str:
        return f"{self._scope['method']} {self._scope['path'][:_LOGGED_CHARS]!r} ({self.request_id})"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            if b"x-request-id" not in dict(message["headers"]):
                message["headers"] = [*message["headers"], (b"x-request-id", self._id)]
            # Clients poll often, so GET and HEAD requests are logged at DEBUG, except if the server failed.
            is_read = self._scope["method"] in ("GET", "HEAD") and message["status"] < 500
            _log(_READ if is_read else _WRITE, f"{self.request}: {message['status']}")
        await self._send(message)

    async def fail(self, error: SageError, receive: Receive) -> None:
        """Answer with an error. If the answer has begun, raise the error; RequestCycle then closes the connection."""
        if self.has_begun:
            raise error
        await error_response(error)(self._scope, receive, self.send)


def _log(attributes: dict[str, Any], message: str) -> None:
    """Log a message in half the time of `logger.log`, which looks up the source line, the thread and the process."""
    if logger.isEnabledFor(attributes["levelno"]):
        record = logging.LogRecord.__new__(logging.LogRecord)
        vars(record).update(attributes, msg=message, created=time.time())
        logger.handle(record)


def _unexpected(error: Exception, answer: _Answer) -> SageError:
    if overloaded := out_of_descriptors(error):
        return overloaded
    logger.error("%s failed", answer.request, exc_info=error)
    message = f"The gateway failed ({type(error).__name__}); `sage gateway logs` shows the details of {answer.request_id}."
    return SageError(code="internal_error", message=message)


def _check_type(content_type: bytes) -> None:
    if content_type == b"application/json":
        return
    media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"The body's Content-Type is {media_type[:100] or 'missing'}; it must be application/json."
        raise Refusal(415, "unsupported_media_type", message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
