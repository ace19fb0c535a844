"""The commands `sage backup` and `sage restore`."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Argument(metavar="FILE", help="Backup file, for example sage.tar.gz.")]
Outputs = Annotated[bool, typer.Option("--outputs/--no-outputs", help="Include the output folders of runs.")]


def save(
    file: File,
    outputs: Outputs = True,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="Include all checkpoints; default: the newest checkpoint of each unfinished run."
        ),
    ] = False,
    database: Annotated[
        bool, typer.Option("--database/--no-database", help="Include the database of the state folder.")
    ] = True,
) -> None:
    """Write the engines, settings, runs and output folders to one file. The gateway and the engines can continue to run.

    Base models and datasets are not included.
    """
    from sage.cli import extras, render

    extras.require("sage.libs.finetune", "A backup")
    from sage.cli.backup.saving import Content, save

    with _progress() as begin:
        content = Content(database=database, all_checkpoints=checkpoints, outputs=outputs)
        size_bytes = save(file.absolute(), content, lambda total_bytes: begin("Writing", total_bytes))
    typer.echo(
        f"{file} is written ({render.size(size_bytes)}). It contains keys and training data: keep it private.", err=True
    )


def restore(
    file: File,
    outputs: Outputs = True,
    force: Annotated[
        bool, typer.Option("--force", help="If data exists already, rename the existing folders to NAME.before-TIME.")
    ] = False,
) -> None:
    """Verify a backup, and restore it into empty folders.

    After this, `sage gateway start` restarts engines according to their restart policies.
    """
    from sage.cli import extras

    extras.require("sage.libs.finetune", "A restoration")
    from sage.cli.backup.restoring import restore

    with _progress() as begin:
        restored = restore(file.absolute(), force=force, outputs=outputs, begin=begin)
    for folder in restored.set_aside:
        typer.echo(f"An existing folder was renamed to {folder}.", err=True)
    for folder in restored.skipped:
        typer.echo(f"{folder} exists already and was not changed.", err=True)
    typer.echo(f"The backup {file} is restored. To start the gateway and its engines: `sage gateway start`.", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield a function that begins a progress bar on stderr; without a terminal, no bar is shown."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:

        def begin(activity: str, total_bytes: int) -> Callable[[int], None]:
            task = progress.add_task(activity, total=total_bytes)
            return lambda count: progress.advance(task, count)

        yield begin
