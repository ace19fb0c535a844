"""Waiting for an engine, with something to look at."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import typer

from sage.common.errors import EngineError, GatewayUnreachable
from sage.common.progress_bar import ProgressBar, eta_text
from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineState, EngineView

_POLL_SECONDS = 0.2
#: The gateway may be restarted while we wait.
_PATIENCE_SECONDS = 60.0


def until_running(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine answers or trains; raises EngineError where it ends otherwise."""
    engine = until_begun(client, engine_id)
    if engine.state is EngineState.FAILED:
        raise failure(engine)
    return engine


def until_begun(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine answers or trains, or has ended."""
    return _watch(client, engine_id, lambda e: e.state is EngineState.RUNNING or e.state in SETTLED)


def until_ended(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine has ended, however it does."""
    return _watch(client, engine_id, lambda e: e.state in SETTLED)


def failure(engine: EngineView) -> EngineError:
    """Return the error of an engine that has failed."""
    reason = engine.reason
    hint, log = reason.hint if reason else "", f"`sage llm engine logs {engine.id}`"
    return EngineError(
        code=reason.code if reason else "failed",
        message=f"{engine.id} failed: {reason.message if reason else 'no reason is known.'}",
        hint=hint if log in hint else f"{hint} Its log: {log}.".strip(),
    )


def _watch(client: SageClient, engine_id: str, is_done: Callable[[EngineView], bool]) -> EngineView:
    with ProgressBar(engine_id) as bar, interrupts_noted() as interrupted:
        deadline, is_stopping = time.monotonic() + _PATIENCE_SECONDS, False
        while not interrupted.noted:
            try:
                engine = client.get_engine(engine_id)
            except GatewayUnreachable:
                if time.monotonic() > deadline:
                    raise
            else:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                is_stopping = engine.state is EngineState.STOPPING
                _show(bar, engine)
                if is_done(engine):
                    return engine
            time.sleep(_POLL_SECONDS)
    raise left(engine_id, is_stopping=is_stopping)


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed; no threading.Event, whose lock the interrupted code may hold: setting it would hang."""

    noted: bool = False


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Interrupt]:
    """Note Ctrl-C for the length of the block, where as an exception it could be lost in a finalizer; twice is at once."""
    interrupt = Interrupt()

    def note(*_: object) -> None:
        if interrupt.noted:
            raise KeyboardInterrupt
        interrupt.noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _show(bar: ProgressBar, engine: EngineView) -> None:
    training = engine.training
    if training is None:
        bar.show(f"{engine.state}: {engine.name}", 0, None, None, "")
    else:
        eta = eta_text(training.eta_seconds)
        bar.show(training.activity or engine.state, training.step, training.total_steps, training.loss, eta)


def left(engine_id: str, *, is_stopping: bool = False) -> typer.Exit:
    """Return the end of a command that was interrupted, once it has said what becomes of the engine."""
    told = f"\n{engine_id} goes on. Watch it: `sage llm engine logs {engine_id} --follow`; "
    told += f"stop it: `sage llm engine stop {engine_id}`."
    if is_stopping:
        told = f"\n{engine_id} goes on stopping. Look at it: `sage llm engine status {engine_id}`."
    typer.echo(told, err=True)
    return typer.Exit(130)
