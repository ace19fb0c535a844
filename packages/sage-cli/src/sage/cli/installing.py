"""Show the progress of an installation, and handle its interruption."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sage.llm.control_plane.backends.environments import Environment

_TEXT_LETTERS = 60
#: Only lines with one of these first words are shown. `Waiting` means that another command is installing the backend.
_SHOWN = ("Collecting", "Installing", "Waiting")


@contextlib.contextmanager
def progress(environment: Environment, *, is_verbose: bool) -> Iterator[Callable[[str], None]]:
    """Show pip's progress on stderr. The caller passes each line of pip's output to the yielded function."""
    if is_verbose or not sys.stderr.isatty():
        yield lambda line: typer.echo(line, err=True) if is_verbose or line.startswith("Waiting") else None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        # pip prints one "Collecting" line for each pinned package, and then installs all packages in one step.
        task = bar.add_task("Creating the environment", total=environment.pins().count("==") or None)

        def report(line: str) -> None:
            if line.startswith("Collecting "):
                bar.advance(task)
            if line.startswith(_SHOWN):
                bar.update(task, description=line[:_TEXT_LETTERS])

        yield report


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C within the block."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
