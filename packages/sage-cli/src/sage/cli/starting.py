"""Start an engine from the command line, for `engine start` and `fine-tune`."""

import os
import sys
from collections.abc import Callable
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import typer

from sage.cli import daemon, waiting
from sage.cli.render import ending
from sage.cli.training_options import OPTIONS
from sage.common.errors import ConfigError
from sage.common.model_names import absolute_name
from sage.llm.client import SageClient
from sage.llm.client.types import EngineKind, EngineState, EngineView


def start_engine(
    model: str,
    kind: str,
    options: dict[str, Any],
    *,
    request: dict[str, Any] | None = None,
    wait: bool | None = None,
    json: bool = False,
    announce: str = "{id}",
) -> None:
    """Start an engine, print its id, and wait for the engine.

    request: other fields of StartRequest.
    wait: how long to wait. False: until the engine is validated; None: until it serves or trains; True: until it has ended.
    announce: format string of the line that is printed; `{id}` is replaced by the engine's id.
    """
    _check_given(model, kind, options)
    fields = {**_named(model, kind), "engine_kind": kind, **(request or {})}
    client = daemon.connect()

    def begin(options: dict[str, Any]) -> EngineView:
        # Ctrl-C must not interrupt this request, because the id of the started engine would be lost.
        with waiting.interrupts_noted() as interrupted:
            engine = client.start_engine(**fields, options=options)
        if interrupted.noted:
            raise waiting.interrupted_exit(engine.id, engine.state)
        return engine

    engine = begin(options)
    if kind == EngineKind.FINETUNE and is_interactive() and not options.get("allow_warnings"):
        engine = _confirmed(client, engine, lambda: begin({**options, "allow_warnings": True}))
    follow_start(client, engine, wait=wait, json=json, announce=announce)


def follow_start(client: SageClient, engine: EngineView, *, wait: bool | None, json: bool, announce: str = "{id}") -> None:
    """Print the id of an engine that was created, and wait for the engine. For `wait` and `announce`, see `start_engine`."""
    if not json:
        typer.echo(announce.format(id=engine.id))
        sys.stdout.flush()
    engine = waiting.until_validated(client, engine.id)
    if wait is not False:
        engine = waiting.until_running(client, engine.id)
        if engine.kind != EngineKind.FINETUNE:
            chat = f". Chat with it: `sage llm chat {engine.name}`" if engine.kind == EngineKind.LLM else ""
            typer.echo(f"Serving '{engine.name}' at {client.base_url}/v1{chat}.", err=True)
    if wait:
        engine = waiting.until_settled(client, engine.id)
        typer.echo(ending(engine), err=True)
        if engine.state is EngineState.FAILED:
            raise waiting.failure(engine)
    if json:
        typer.echo(engine.model_dump_json(indent=2))


def absolute_path(path: str) -> str:
    """Return the absolute path, with `~` expanded."""
    return str(Path(os.path.expanduser(path)).absolute())  # noqa: PTH111 - Path.expanduser can raise


def serve_request(*, serve: bool, name: str | None, checkpoints: bool) -> dict[str, Any]:
    """Return the field `serve` of StartRequest in a dictionary; {} if the training result will not be served."""
    if not (serve or name or checkpoints):
        return {}
    return {"serve": {"name": name, "checkpoints": checkpoints}}


def admission_request(
    on_busy: str | None, priority: int | None, devices: str | None, memory_gb: float | None, not_before: str | None
) -> dict[str, Any]:
    """Return the given options as the fields of StartRequest that concern the queue; options that are None are omitted."""
    fields = {
        "on_busy": on_busy,
        "priority": priority,
        "devices": devices.replace(" ", "").split(",") if devices else None,
        "memory_gb": memory_gb,
        "not_before": start_time(not_before, datetime.now().astimezone()).isoformat() if not_before else None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def start_time(text: str, now: datetime) -> datetime:
    """Parse HH:MM or an ISO 8601 date and time. HH:MM means the next time at which the clock shows HH:MM.

    now: the current local time. A text without a time zone is interpreted as local time.
    Raises ConfigError if the text is in neither format.
    """
    try:
        if len(text) <= len("22:00"):
            at = datetime.combine(now.date(), time.fromisoformat(text))
            # `astimezone` without an argument uses the offset that local time has at that date.
            return (at if at > now.replace(tzinfo=None) else at + timedelta(days=1)).astimezone()
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            code="config_invalid",
            message=f"--not-before '{text}' is not a time.",
            hint="Examples: --not-before 22:00, --not-before 2027-01-31T22:00",
            param="not_before",
        ) from error
    return moment if moment.tzinfo else moment.astimezone()


def is_interactive() -> bool:
    """Return whether stdin and stderr are terminals."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _check_given(model: str, kind: str, options: dict[str, Any]) -> None:
    if not model:  # for example, a shell variable that is not set
        raise ConfigError(
            code="config_invalid", message="The model's name is empty.", hint="Give the name or folder of a model."
        )
    for field, flag in (("dataset_path", "--dataset"), ("output_dir", "--output")):
        if kind == EngineKind.FINETUNE and field not in options:
            raise ConfigError(code="option_missing", message=f"An engine of kind finetune needs {flag}.", param=flag)
    for option in OPTIONS:
        if kind != EngineKind.FINETUNE and option.field in options:
            flag = option.declaration.partition("/")[0]
            message = f"{flag} is an option of training runs; an engine of kind {kind} does not have it."
            hint = f"To train, add `--engine-kind finetune`. Otherwise, omit {flag}."
            raise ConfigError(code="config_invalid", message=message, hint=hint, param=option.field)


def _named(model: str, kind: str) -> dict[str, str]:
    name = absolute_name(model, Path.cwd())
    if not name.startswith("/"):
        return {"model": model}
    served = {} if kind == EngineKind.FINETUNE else {"name": Path(name).name}
    return {"model": str(Path(name).resolve()), **served}


def _confirmed(client: SageClient, engine: EngineView, begin_again: Callable[[], EngineView]) -> EngineView:
    """Wait until the engine trains or has ended.

    If the engine ended because of dataset warnings, and the user accepts the warnings, replace the engine by a new engine.
    """
    engine = waiting.until_begun(client, engine.id)
    if engine.state is not EngineState.FAILED or not engine.reason or engine.reason.code != "dataset_warnings":
        return engine
    typer.echo(f"{engine.reason.message}\n  {engine.reason.hint}", err=True)
    if not typer.confirm("Train despite the warnings?", err=True):
        return engine
    client.remove_engine(engine.id)
    return begin_again()
