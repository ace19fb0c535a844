"""Middleware of inference servers: accepts only requests from programs on this machine, and returns all errors as JSON."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage.common.errors import RETRY_AFTER_SECONDS, ConfigError, SageError
from sage.llm.workers.failures import internal_error

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def error_response(error: SageError, status: int | None = None) -> JSONResponse:
    """Return an error response in OpenAI's format."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.http_status == 503 else None
    return JSONResponse(error.body(), status_code=status or error.http_status, headers=headers)


class Guard:
    """Rejects requests from web pages of other sites, and turns unexpected exceptions into responses.

    A web page in the user's browser can send requests to loopback. Such requests have an `Origin` header.
    With DNS rebinding, the `Host` header contains another site's host name, which resolves to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the application, or reject it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := _refusal(Headers(scope=scope)):
            await error_response(refusal, 403)(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 # a failed request must not stop the engine
            reported = internal_error(error, f"{scope['method']} {scope['path']}")
            if not has_begun:
                await error_response(reported)(scope, receive, send)


def _refusal(headers: Headers) -> ConfigError | None:
    if not _is_loopback(f"//{headers.get('host', '')}"):
        message = "The Host header is not this machine's loopback address."
        return ConfigError(code="host_not_allowed", message=message)
    if "origin" in headers and not _is_loopback(headers["origin"]):
        return ConfigError(code="origin_not_allowed", message="Requests from web pages of other sites are rejected.")
    return None


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in _LOOPBACK
    except ValueError:
        return False
