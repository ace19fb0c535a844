"""What every request passes before a route sees it, and every answer on its way back."""

import logging
import re
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage.common.errors import SageError
from sage.common.settings import Settings
from sage.llm.gateway.access import check_access, key_of
from sage.llm.gateway.bodies import BodyBudget, parse_json
from sage.llm.gateway.errors import Refusal, error_response, out_of_descriptors

logger = logging.getLogger(__name__)
#: Where in the scope a route finds the body, parsed.
JSON_BODY = "sage.json_body"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_LOGGED_CHARS = 200
#: Streams have no end that HEAD could wait for.
_STREAMS = ("/logs", "/events")


class Gate:
    """Checks access and body, names the request, and answers for what fails unforeseen."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._key = app, key_of(settings)
        self._budget = BodyBudget(settings.max_request_mb * 1_000_000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            await self._pass(scope, receive, answer)
        except ClientDisconnect:
            return
        except SageError as error:
            await answer.fail(error, receive)
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            await answer.fail(_unforeseen(error, answer), receive)

    async def _pass(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        headers = Headers(scope=scope)
        check_access(scope["path"], headers, self._key)
        if scope["method"] == "HEAD" and not scope["path"].endswith(_STREAMS):
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        with self._budget.body() as body:
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                await body.read(headers, receive)
                if body.content:
                    _check_type(headers)
                    scope[JSON_BODY] = parse_json(body.content)
                receive = _replayed(body.content, receive)
            await self._app(scope, receive, answer.send)


class _Answer:
    """The way back: every answer carries the request's id."""

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
            is_look = self._scope["method"] in ("GET", "HEAD") and message["status"] < 500  # the command line polls
            logger.log(logging.DEBUG if is_look else logging.INFO, "%s: %d", self.request, message["status"])
        await self._send(message)

    async def fail(self, error: SageError, receive: Receive) -> None:
        """Answer with an error, unless an answer is on its way already: then end it short, which its reader notices."""
        if self.has_begun:
            raise error
        await error_response(error)(self._scope, receive, self.send)


def _unforeseen(error: Exception, answer: _Answer) -> SageError:
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
    """Return a `receive` that gives a body that was read once more, then what comes after it."""
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
