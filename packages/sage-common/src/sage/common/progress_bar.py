"""Progress bar for the commands that wait for a run."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Progress bar on stderr, shown only on a terminal and removed at the end."""

    def __init__(self, title: str) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[figures]}"))
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
        )
        self._task = self._progress.add_task(title, total=None, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, what: str, step: int, total_steps: int | None, loss: float | None, eta: str) -> None:
        """Update the bar. Before the first step, the bar shows only `what`, the current activity."""
        figures = f"{step}/{total_steps}  loss {loss:.4f}  ETA {eta}" if step and loss is not None else ""
        self._progress.update(self._task, description=what, completed=step, total=total_steps, figures=figures)


def duration(seconds: float) -> str:
    """Format a duration with at most two units, such as 3h05m."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 60:
        return f"{seconds:.0f}s"
    if minutes < 60:
        return f"{int(minutes)}m{int(seconds % 60):02}s"
    if hours < 24:
        return f"{int(hours)}h{int(minutes % 60):02}m"
    return f"{int(days)}d{int(hours % 24):02}h"


def eta_text(eta_seconds: float | None) -> str:
    """Format the remaining time of a run."""
    return "estimating" if eta_seconds is None else duration(eta_seconds)
