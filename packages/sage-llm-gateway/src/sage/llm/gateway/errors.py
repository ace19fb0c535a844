"""Every error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from sage.common.errors import ConfigError, NotFound, Overloaded, SageError

logger = logging.getLogger(__name__)
RETRY_AFTER_SECONDS = 5


def error_response(error: SageError) -> JSONResponse:
    """Return an error as it goes over the wire."""
    body = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if isinstance(error, Overloaded) else None
    return JSONResponse({"error": body}, status_code=error.http_status, headers=headers)


def install(app: FastAPI) -> None:
    """Make an application tell its errors so."""

    @app.exception_handler(SageError)
    async def told(_: Request, error: SageError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "body"
        message = f"{name}: {first['msg']}."
        return error_response(ConfigError(code="config_invalid", message=message, param=name))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        told = NotFound(code="not_found", message=f"{request.method} {request.url.path}: {error.detail}.")
        answer = error_response(told)
        answer.status_code = error.status_code
        return answer

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
        return error_response(SageError(code="io_error", message=message, hint="Nothing was started; mend it, try again."))

    @app.exception_handler(SQLAlchemyError)
    async def database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        message = f"The engines' database refused: {str(getattr(error, 'orig', None) or error).splitlines()[0]}."
        hint = "What it held before is kept; free some space or mend it, then try again."
        return error_response(SageError(code="database_error", message=message, hint=hint))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        message = f"The gateway failed ({type(error).__name__}); its log says more."
        return error_response(SageError(code="internal_error", message=message))
