"""Waiting for an engine, with something to look at."""

import time
from collections.abc import Callable

import typer

from sage.common.errors import EngineError, GatewayUnreachable
from sage.libs.finetune.progress_bar import ProgressBar, eta_text
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
    with ProgressBar(engine_id) as bar:
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
                _show(bar, engine)
                if is_done(engine):
                    return engine
            try:
                time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                raise _left(engine_id) from None


def _show(bar: ProgressBar, engine: EngineView) -> None:
    training = engine.training
    if training is None:
        bar.show(f"{engine.state}: {engine.name}", 0, None, None, "")
    else:
        eta = eta_text(training.eta_seconds)
        bar.show(training.activity or engine.state, training.step, training.total_steps, training.loss, eta)


def _left(engine_id: str) -> typer.Exit:
    typer.echo(
        f"\n{engine_id} goes on. Watch it: `sage llm engine logs {engine_id} --follow`; "
        f"stop it: `sage llm engine stop {engine_id}`.",
        err=True,
    )
    return typer.Exit(130)
