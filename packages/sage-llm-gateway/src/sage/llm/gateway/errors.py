"""Convert errors to HTTP answers in OpenAI's format."""

import errno
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from starlette.exceptions import HTTPException

from sage.common.errors import RETRY_AFTER_SECONDS, ConfigError, Overloaded, SageError

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class Refusal(SageError):
    """The error for a request that is rejected because of its HTTP form (headers, body or path)."""

    type = "invalid_request_error"

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        """status: HTTP status of the answer; code, message, hint: as in SageError."""
        super().__init__(code=code, message=message, hint=hint)
        self.http_status = status


def error_response(error: SageError) -> JSONResponse:
    """Return the HTTP answer that reports an error."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if isinstance(error, Overloaded) else None
    return JSONResponse(error.body(), status_code=error.http_status, headers=headers)


def out_of_descriptors(error: BaseException) -> Overloaded | None:
    """Return an Overloaded error if `error` means that no file descriptor is left; otherwise None."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Overloaded(
            code="too_many_connections",
            message="The gateway has no file descriptor left for this request.",
            hint="Retry in some seconds; `ulimit -n` sets the maximum number of file descriptors.",
        )
    return None


def install(app: FastAPI) -> None:
    """Add handlers that report expected errors in OpenAI's format. `Gate` reports unexpected exceptions."""

    @app.exception_handler(SageError)
    async def expected(_: Request, error: SageError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        place, *names = first["loc"]
        parts = names[:1] if place == "query" else names  # the query parameter's name is the first part
        name = ".".join(str(part) for part in parts) or "body"
        message = f"{name}: {first['msg'].removeprefix('Value error, ')}."
        return error_response(ConfigError(code="config_invalid", message=message, param=name))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _HTTP_CODES.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        answer = error_response(Refusal(error.status_code, code, message))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        if overloaded := out_of_descriptors(error):
            return error_response(overloaded)
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
        return error_response(SageError(code="io_error", message=message, hint="Fix this problem, then retry."))

    @app.exception_handler(SQLAlchemyError)
    async def database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        message = f"The engines' database reported an error: {str(getattr(error, 'orig', None) or error).splitlines()[0]}."
        hint = "Nothing was changed. Free up disk space or fix the database, then retry."
        kind = Overloaded if isinstance(error, OperationalError) else SageError
        return error_response(kind(code="database_error", message=message, hint=hint))
