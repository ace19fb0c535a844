"""Wait for an engine, with a progress bar."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import typer

from sage.common.error_codes import error_class
from sage.common.errors import Conflict, GatewayUnreachable, SageError
from sage.common.progress_bar import ProgressBar, eta_text
from sage.llm.client import SageClient
from sage.llm.client.types import SETTLED, EngineState, EngineView

_POLL_SECONDS = 0.2
#: If the gateway is unreachable for more than this number of seconds, the command fails. A restart of the gateway takes
#: less time.
_PATIENCE_SECONDS = 60.0


def until_validated(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine's dataset or model has been checked. Raises SageError if the engine failed."""
    engine = _watch(client, engine_id, lambda e: e.state is not EngineState.VALIDATING)
    if engine.state is EngineState.FAILED:
        raise failure(engine)
    return engine


def until_running(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine serves, trains or has ended. Raises SageError if the engine failed."""
    engine = until_begun(client, engine_id)
    if engine.state is EngineState.FAILED:
        raise failure(engine)
    return engine


def until_begun(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine serves or trains, or has ended (stopped, completed or failed)."""
    return _watch(client, engine_id, lambda e: e.state is EngineState.RUNNING or e.state in SETTLED)


def until_paused(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine is paused, or has ended (stopped, completed or failed)."""
    return _watch(client, engine_id, lambda e: e.state is EngineState.PAUSED or e.state in SETTLED)


def until_settled(client: SageClient, engine_id: str) -> EngineView:
    """Wait until an engine has ended (stopped, completed or failed)."""
    return _watch(client, engine_id, lambda e: e.state in SETTLED)


def until_checkpoint(client: SageClient, before: EngineView) -> int:
    """Wait until a run has a newer checkpoint than the checkpoint in `before`, and return the newer checkpoint's step.

    Raises SageError if the run ends without a newer checkpoint.
    """
    old_step = (before.training and before.training.checkpoint_step) or 0

    def step_of(engine: EngineView) -> int:
        return (engine.training and engine.training.checkpoint_step) or 0

    engine = _watch(client, before.id, lambda e: step_of(e) > old_step or e.state in SETTLED)
    if step_of(engine) > old_step:
        return step_of(engine)
    raise Conflict(
        code="not_training", message=f"{engine.id} ended before it saved a checkpoint. Its state is {engine.state}."
    )


def until_changed(client: SageClient, engine_id: str, revision: int) -> str:
    """Wait until a run uses the requested options, and return the text of the change.

    Raises Conflict if the run ends or is paused before it uses the options.
    """

    def is_applied(engine: EngineView) -> bool:
        return engine.training is not None and engine.training.change_revision >= revision

    engine = _watch(client, engine_id, lambda e: is_applied(e) or e.state in (*SETTLED, EngineState.PAUSED))
    if engine.training and is_applied(engine):
        return engine.training.changes[-1]
    raise Conflict(
        code="not_training", message=f"The requested options were not used, because {engine_id} is {engine.state}.",
        hint="To use the options, resume the run." if engine.state != "completed" else "To train further, fork the run.",
    )  # fmt: skip


def failure(engine: EngineView) -> SageError:
    """Return the error of a failed engine."""
    code = engine.reason.code if engine.reason else "unknown"
    hint = engine.reason.hint if engine.reason else ""
    kind, log = error_class(code), f"`sage llm engine logs {engine.id}`"
    # A hint that names the log is complete. After a rejected request (400), any hint is complete: the log has no details.
    is_complete = log in hint or (hint and kind.http_status == 400)
    return kind(
        code=code,
        message=f"{engine.id} failed: {engine.reason.message if engine.reason else 'the reason is not known.'}",
        hint=hint if is_complete else f"{hint} The engine's log: {log}.".strip(),
    )


def _watch(client: SageClient, engine_id: str, is_done: Callable[[EngineView], bool]) -> EngineView:
    state, shown = None, ""
    with ProgressBar(engine_id) as bar, interrupts_noted() as interrupted:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not interrupted.noted:
            try:
                engine = client.get_engine(engine_id)
            except GatewayUnreachable:
                if time.monotonic() > deadline:
                    raise
            else:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                state = engine.state
                if engine.queue_position and engine.reason and engine.reason.code != shown:
                    shown = engine.reason.code
                    typer.echo(f"{engine_id} waits. {engine.reason.message} {engine.reason.hint}".rstrip(), err=True)
                _show(bar, engine)
                if is_done(engine):
                    return engine
            time.sleep(_POLL_SECONDS)
    raise interrupted_exit(engine_id, state)


@dataclass
class Interrupt:
    """Stores whether Ctrl-C was pressed.

    threading.Event cannot be used, because `set` in a signal handler hangs if the interrupted code holds the event's lock.
    """

    noted: bool = False


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Interrupt]:
    """Record the first Ctrl-C during the `with` block. A second Ctrl-C raises KeyboardInterrupt.

    The first Ctrl-C raises nothing, because Python would ignore the exception if a finalizer is running.
    """
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


def interrupted_exit(engine_id: str, state: EngineState | None) -> typer.Exit:
    """Print the engine's state, and commands to show or stop the engine. Return an exception that ends the CLI."""
    text = f"\n{engine_id} is still {state or 'active'}. Show it: `sage llm engine status {engine_id}`"
    stop = "" if state is EngineState.STOPPING else f"; stop it: `sage llm engine stop {engine_id}`"
    typer.echo(f"{text}{stop}.", err=True)
    return typer.Exit(130)
