"""Read the JSON bodies of requests. Bodies that are too large, nested too deeply or not valid Unicode are rejected."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from sage.common.errors import ConfigError
from sage.common.nesting import MAX_LEVELS, is_too_deep

#: A JSON escape of a surrogate. A surrogate is half a character, and is not valid Unicode without the other half.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonRequest(Request):
    """A request that stops reading its body as soon as the body exceeds the size limit."""

    async def body(self) -> bytes:
        """Return the body. Raises HTTPException 413 as soon as the body exceeds `app.state.max_request_bytes`."""
        if not hasattr(self, "_body"):
            limit: int = self.app.state.max_request_bytes
            declared = self.headers.get("content-length", "")
            body = bytearray()
            if declared.isdecimal() and int(declared) > limit:
                _refuse_size(limit)
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit:
                    _refuse_size(limit)
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        """Return the parsed body.

        Raises HTTPException 400 if the body is not valid JSON, is nested too deeply, or contains lone surrogates.
        """
        try:
            text = (await self.body()).decode()
            content = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            _refuse_nesting()
        except ValueError as error:
            _refuse("invalid_json", f"The body is not valid JSON: {error}.")
        if is_too_deep(content):
            _refuse_nesting()
        if _SURROGATE_ESCAPE.search(text):
            try:
                json.dumps(content, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                _refuse(
                    "invalid_unicode", "The body is not valid Unicode: it contains a lone surrogate (half of a character)."
                )
        return content


class JsonRoute(APIRoute):
    """A route that reads request bodies with JsonRequest, and accepts application/json only.

    Other content types are rejected, because browsers let any web page send text/plain to a server on this machine without a
    CORS preflight.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """Return a handler that checks the content type and calls FastAPI's handler with a JsonRequest."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and media_type != "application/json":
                _refuse("unsupported_media_type", "The request must have the header 'Content-Type: application/json'.", 415)
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _refuse(code: str, message: str, status: int = 400) -> NoReturn:
    raise HTTPException(status, ConfigError(code=code, message=message))


def _refuse_size(limit: int) -> NoReturn:
    _refuse("request_too_large", f"The body is larger than {limit / 1e6:g} MB, the limit set by SAGE_MAX_REQUEST_MB.", 413)


def _refuse_nesting() -> NoReturn:
    _refuse("nesting_too_deep", f"The body is nested deeper than {MAX_LEVELS} levels.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
