"""What both inference servers share: OpenAI's error shape, health, start and end."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from sage.common.errors import ConfigError, SageError
from sage.common.logs import configure_logging
from sage.libs.models.loading import local_folder
from sage.libs.models.resolve import ModelKind, ModelSource, resolve_model


def create_app() -> FastAPI:
    """Return an application that answers `/health` and tells errors in OpenAI's shape."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(SageError)
    async def told(_: Request, error: SageError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return _error(ConfigError(code="invalid_value", message=f"{name}: {first['msg']}.", param=name))

    return app


def _error(error: SageError) -> JSONResponse:
    body = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, status_code=error.http_status)


def parser() -> argparse.ArgumentParser:
    """Return the options that both servers have."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True)
    options.add_argument("--port", type=int, required=True)
    return options


def load_source(name: str) -> tuple[ModelSource, Path]:
    """Return where a model is, and the folder of its base weights, converted or downloaded where need be."""
    source = resolve_model(name)
    base = source.base if source.kind is ModelKind.ADAPTER and source.base else source
    return source, local_folder(base)


def run(build: Callable[[], FastAPI], port: int) -> None:
    """Load and serve; what goes wrong in loading is the last line of the log and exit code 1."""
    configure_logging()
    try:
        app = build()
    except SageError as error:
        print(" ".join(str(error).split()), file=sys.stderr)  # one line: the control plane tells it on
        sys.exit(1)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
