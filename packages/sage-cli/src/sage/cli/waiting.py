"""Waiting for an engine, with something to look at."""

import sys
import time
from collections.abc import Callable

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sage.cli import render
from sage.common.errors import EngineError, GatewayUnreachable
from sage.llm.client import SageClient
from sage.llm.control_plane.states import SETTLED, EngineState
from sage.llm.control_plane.types import EngineView

_POLL_SECONDS = 0.2
#: The gateway may be restarted while we wait.
_PATIENCE_SECONDS = 60.0


def until_running(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine answers or trains; raises EngineError where it ends otherwise."""
    engine = _watch(client, engine_id, lambda e: e.state is EngineState.RUNNING or e.state in SETTLED)
    if engine.state is EngineState.FAILED:
        raise failure(engine)
    return engine


def until_ended(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine has ended, however it does."""
    return _watch(client, engine_id, lambda e: e.state in SETTLED)


def failure(engine: EngineView) -> EngineError:
    """Return the error of an engine that has failed."""
    reason = engine.reason
    return EngineError(
        code=reason.code if reason else "failed",
        message=f"{engine.id} failed: {reason.message if reason else 'no reason is known.'}",
        hint=f"{reason.hint if reason else ''} Its log: `sage llm engine logs {engine.id}`.".strip(),
    )


def _watch(client: SageClient, engine_id: str, is_done: Callable[[EngineView], bool]) -> EngineView:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
    with Progress(*columns, console=render.stderr(), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(engine_id, total=None, figures="")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                engine = client.get_engine(engine_id)
            except GatewayUnreachable:
                if time.monotonic() > deadline:
                    raise
            except KeyboardInterrupt:
                raise _left(engine_id) from None
            else:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                description, figures = _described(engine)
                steps = engine.training.total_steps if engine.training else None
                done = engine.training.step if engine.training else 0
                progress.update(task, description=description, total=steps, completed=done, figures=figures)
                if is_done(engine):
                    return engine
            try:
                time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                raise _left(engine_id) from None


def _described(engine: EngineView) -> tuple[str, str]:
    training = engine.training
    if training is None or training.activity or not training.step:
        return f"{engine.state}: {(training and training.activity) or engine.name}", ""
    loss = f"loss {training.loss:.4f}" if training.loss is not None else ""
    left = "ETA estimating" if training.eta_seconds is None else f"ETA {render.duration(training.eta_seconds)}"
    return engine.state, f"{training.step}/{training.total_steps}  {loss}  {left}"


def _left(engine_id: str) -> typer.Exit:
    typer.echo(
        f"\n{engine_id} goes on. Watch it: `sage llm engine logs {engine_id} --follow`; "
        f"stop it: `sage llm engine stop {engine_id}`.",
        err=True,
    )
    return typer.Exit(130)
