"""Show the estimated memory of an engine, for `sage llm estimate`."""

from pathlib import Path
from typing import Any

from rich.table import Table

from sage.cli import daemon
from sage.cli.render import size, stdout
from sage.common.model_names import absolute_name
from sage.common.progress_bar import duration
from sage.llm.client.types import EstimateView


def show_estimate(model: str, kind: str, options: dict[str, Any], *, backend: str | None, json: bool) -> None:
    """Print the estimated memory of an engine with the given options of `engine start`."""
    chosen = {} if backend is None else {"backend": backend}
    name = absolute_name(model, Path.cwd())
    estimate = daemon.connect().estimate(name, engine_kind=kind, options=options, **chosen)
    if json:
        print(estimate.model_dump_json(indent=2))
        return
    stdout().print(estimate_table(estimate))
    for line in estimate_lines(estimate):
        print(line)


def estimate_table(estimate: EstimateView) -> Table:
    """Return a table with the memory of each part of an estimate, and the total. Parts without memory are omitted."""
    table = Table("MEMORY", box=None, pad_edge=False, header_style="bold")
    table.add_column("SIZE", justify="right")
    for name, part_bytes in estimate.parts.items():
        if part_bytes:
            table.add_row(name, size(part_bytes))
    table.add_row("total", size(estimate.total_bytes), style="bold")
    return table


def estimate_lines(estimate: EstimateView) -> list[str]:
    """Return lines that state the free memory, whether the engine fits, the largest micro-batch and the training time."""
    lines = [
        f"{device.id} {device.name}: {size(device.memory_total_bytes - device.memory_used_bytes)} free of "
        f"{size(device.memory_total_bytes)}"
        for device in estimate.devices
    ]
    verb = "fits" if estimate.fits else "does not fit"
    lines.append(f"With the backend {estimate.backend}, the engine {verb}; it needs at least {size(estimate.least_bytes)}.")
    if estimate.fitting_samples is not None:
        lines.append(f"The largest micro-batch that fits has {estimate.fitting_samples:,} samples of the maximum length.")
    if estimate.training_seconds is not None:
        lines.append(f"Training takes about {duration(estimate.training_seconds)}, at the speed of an earlier run.")
    return lines
