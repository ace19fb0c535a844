"""Common parts of the inference servers: error responses in OpenAI's format, health check, start and shutdown."""

import argparse
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sage.common.errors import ConfigError, NotFound, SageError
from sage.common.logs import configure_logging
from sage.common.settings import load_settings
from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model
from sage.llm.workers.bodies import JsonRoute
from sage.llm.workers.failures import exit_on_error
from sage.llm.workers.guard import Guard, error_response
from sage.llm.workers.jobs import ClientGone

#: Seconds until the server closes an idle connection.
_KEEP_ALIVE_SECONDS = 75
#: Maximum seconds to wait for the end of answers in progress when the engine stops.
_SHUTDOWN_SECONDS = 3


class ErrorDetail(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str
    hint: str


class ErrorAnswer(BaseModel):
    """An error response."""

    error: ErrorDetail


_REFUSALS = {400: "invalid request", 403: "request from another site or host", 413: "body too large",
             415: "content type is not JSON", 500: "unexpected error", 503: "out of memory, or stopping"}  # fmt: skip
ANSWERED: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "model": ErrorAnswer} for status, description in _REFUSALS.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {
    **ANSWERED, 404: {"description": "no such model", "model": ErrorAnswer},
    200: {"description": "the answer, or the chunks of a stream", "content": {"text/event-stream": {"schema": {}}}},
}  # fmt: skip


def create_app(title: str, close: Callable[[], None], about: Callable[[], dict[str, Any]] = dict) -> FastAPI:
    """Return an application with `/health` and OpenAI's error format.

    close: called at shutdown.  about: returns more fields for `/health`, or raises SageError if the server cannot
    answer.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.close, app.state.about = close, about
    app.state.max_request_bytes = load_settings().max_request_mb * 1_000_000
    app.add_middleware(Guard)

    @app.get("/health", responses={status: ANSWERED[status] for status in (403, 500, 503)})
    async def health() -> dict[str, Any]:
        return {"status": "ok", "engine": os.environ.get("SAGE_ENGINE_ID"), "pid": os.getpid(), **about()}

    @app.exception_handler(SageError)
    async def failed(_: Request, error: SageError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(invalid_request(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        detail: Any = error.detail
        if not isinstance(detail, SageError):
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            detail = NotFound(code=code, message=f"{request.method} {request.url.path}: {detail}.")
        return error_response(detail, error.status_code)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)  # no client receives this response

    return app


def invalid_request(findings: list[dict[str, Any]]) -> ConfigError:
    """Return one error for the first invalid field that pydantic reports."""
    place = findings[0]["loc"][:2]
    finding = max((found for found in findings if found["loc"][:2] == place), key=lambda found: len(found["loc"]))
    # The path from pydantic also contains the names of union members, which are not fields.
    path = [str(part) for part in finding["loc"][1:] if part not in ("str", "int", "bool") and "[" not in str(part)]
    name, param = ".".join(path) or "The body", str(place[1]) if len(place) > 1 else None
    match finding["type"]:
        case "extra_forbidden":
            problem, code, hint = "is not supported by this engine", "unsupported_value", "Remove this field."
        case "literal_error":
            problem, code, hint = f"can only be {finding['ctx']['expected']}", "unsupported_value", ""
        case "missing":
            problem, code, hint = "is required", "missing_value", ""
        case _:
            problem, code, hint = finding["msg"].removeprefix("Value error, "), "invalid_value", ""
    problem = re.sub(r"^\w+ should", "must", problem).removesuffix(" after validation, not 0")
    problem = problem.replace("False", "false").replace("a valid dictionary or object to extract fields from", "an object")
    return ConfigError(code=code, message=f"{name} {problem}.", hint=hint, param=param)


def parser() -> argparse.ArgumentParser:
    """Return an argument parser with the options that all servers have."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True)
    options.add_argument("--port", type=int, help="Port of the loopback interface to listen on.")
    options.add_argument(
        "--fd", type=int, help="File descriptor of an inherited socket to listen on; use this option instead of --port."
    )
    return options


def load_source(name: str) -> tuple[ModelSource, Path]:
    """Return the ModelSource of a model, and the folder with the model's weights.

    For an adapter, the folder with the weights of the base model is returned. The weights are converted or downloaded if
    necessary.
    """
    source = resolve_model(name)
    base = source.base if source.kind is ModelKind.ADAPTER and source.base else source
    return source, local_folder(base)


def run(build: Callable[[], FastAPI], arguments: argparse.Namespace) -> None:
    """Load and serve the model. If an error ends the server, print the error as the last line of the log."""
    configure_logging()
    with exit_on_error():
        app = build()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    inherited = None if arguments.fd is None else [socket.socket(fileno=arguments.fd)]
    with exit_on_error():
        serve(config, app, inherited)


def serve(config: uvicorn.Config, app: FastAPI, sockets: list[socket.socket] | None) -> None:
    """Answer requests until the process receives a stop signal. Raises SageError if the server cannot answer any more."""
    running = _Server(config, app.state.close, app.state.about)
    running.run(sockets=sockets)
    if running.problem:
        raise running.problem


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, close: Callable[[], None], about: Callable[[], dict[str, Any]]) -> None:
        super().__init__(config)
        self._close, self._about = close, about
        self.problem: SageError | None = None  #: why the server cannot answer any more

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server must end: after a stop signal, or if it cannot answer any more."""
        try:
            self._about()
        except SageError as error:
            self.problem = None if self.should_exit else error
            return True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._close()
