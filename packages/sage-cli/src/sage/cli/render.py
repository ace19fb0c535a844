"""Format engines, events, devices and backends for a terminal."""

import sys
from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sage.common.progress_bar import duration, eta_text
from sage.common.training import FIGURES, TrainingProgress
from sage.llm.client.types import BackendView, Device, EngineEvent, EngineKind, EngineView, EventKind, RouteView

_BAR_CELLS = 10
_STATE_STYLES = {
    "running": "green",
    "completed": "green",
    "failed": "red",
    "validating": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
}
#: Width of the console for output to a pipe. A smaller width would cut long lines.
_PIPE_COLUMNS = 240


def stdout() -> Console:
    """Return the console for stdout. Its width is the width of the terminal, or `_PIPE_COLUMNS` if stdout is a pipe."""
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def engine_table(engines: Iterable[EngineView]) -> Table:
    """Return the table of engines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ENGINE", "KIND", "MODEL", "FORM", "STATE", "PROGRESS", "LOSS", "ETA", "AGE", "MEMORY", "PORT"):
        numeric = name in ("LOSS", "ETA", "AGE", "MEMORY", "PORT")
        table.add_column(
            name, no_wrap=name != "MODEL", overflow="fold" if name == "MODEL" else "ellipsis",
            justify="right" if numeric else "left",
        )  # fmt: skip
    for engine in engines:
        style = _STATE_STYLES.get(engine.state, "dim")
        table.add_row(
            engine.id, engine.kind, escape(engine.name), (engine.form or "").partition(" ")[0].rstrip(","),
            f"[{style}]{engine.state}[/]", *_training_cells(engine),
            duration((datetime.now(UTC) - engine.created_at).total_seconds()),
            "" if engine.memory_bytes is None else size(engine.memory_bytes),
            "" if engine.port is None else str(engine.port),
        )  # fmt: skip
    return table


def queue_table(engines: Iterable[EngineView]) -> Table:
    """Return the table of waiting engines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("PLACE", "ENGINE", "KIND", "MODEL", "PRIORITY", "MEMORY", "WHY"):
        table.add_column(name, no_wrap=name not in ("MODEL", "WHY"), overflow="fold")
    for place, engine in enumerate(engines, start=1):
        memory = "" if engine.reserved_bytes is None else size(engine.reserved_bytes)
        why = engine.reason.message if engine.reason else ""
        table.add_row(str(place), engine.id, engine.kind, escape(engine.name), str(engine.priority), memory, escape(why))
    return table


def engine_lines(engine: EngineView) -> list[str]:
    """Return the details of an engine. Each item of the list is one line."""
    why = f" ({engine.backend_reason})" if engine.backend_reason else ""
    facts: list[tuple[str, object]] = [
        ("engine", engine.id), ("kind", engine.kind), ("model", engine.model), ("name", engine.name),
        ("state", engine.state), ("reason", engine.reason and f"{engine.reason.message} {engine.reason.hint}".strip()),
        ("desired", engine.desired.value), ("backend", f"{engine.backend}{why}"), ("form", engine.form),
        ("context", engine.context_tokens and f"{engine.context_tokens} tokens"), ("slots", engine.slots),
        ("cache", engine.kv_cache_tokens and f"{engine.kv_cache_tokens} tokens"),
        ("threads", engine.threads),
        ("restart policy", engine.restart_policy),
        ("restarts", f"{engine.restarts} of {engine.max_restarts}" if engine.restarts else None),
        ("queue", engine.queue_position and f"place {engine.queue_position}"), ("priority", engine.priority or None),
        ("not before", engine.not_before and f"{engine.not_before:%Y-%m-%d %H:%M} UTC"),
        ("devices", engine.devices and ", ".join(engine.devices)),
        ("reserved", None if engine.reserved_bytes is None else size(engine.reserved_bytes)),
        ("port", engine.port), ("pid", engine.pid),
        ("memory", None if engine.memory_bytes is None else size(engine.memory_bytes)),
    ]  # fmt: skip
    if engine.training:
        facts += _training_facts(engine.training, is_active=engine.state == "running")
    facts += [("metadata", f"{key}={value}") for key, value in engine.metadata.items()]
    facts += [
        ("idle stop", None if engine.idle_stop_minutes is None else f"{engine.idle_stop_minutes:g} min"),
        ("served by", engine.served_by),
        ("output", engine.output_dir),
        ("run", engine.run_dir),
        ("log", engine.log_path),
    ]
    return [f"{name:<18} {value}" for name, value in facts if value is not None]


def ending(engine: EngineView) -> str:
    """Return a message with the state of an engine that has ended.

    For a training run, the message also names the files of the run.
    """
    training = engine.training
    if engine.kind is not EngineKind.FINETUNE or training is None:
        return f"{engine.id} is {engine.state}."
    saved = f", checkpoint {engine.run_dir}/checkpoint-{training.checkpoint_step}" if training.checkpoint_step else ""
    if engine.state == "failed":
        return f"{engine.id} has failed{saved}."
    steps = f" at step {training.step} of {training.total_steps}" if training.total_steps else ""
    before, after = training.heldout_loss_before, training.heldout_loss
    heldout = f" Held-out loss {before:.4f} → {after:.4f}." if before is not None and after is not None else ""
    return f"{engine.id} is {engine.state}{steps}: result in {engine.output_dir}{saved}.{heldout}"


def event_line(event: EngineEvent) -> str:
    """Return an event of an engine as one line."""
    is_transition = event.kind in (EventKind.CREATED, EventKind.TRANSITION)
    what = f"{event.before or '·'} → {event.after}" if is_transition else str(event.kind)
    return f"{event.at:%Y-%m-%d %H:%M:%S}  {what:<22} {event.actor:<10} {event.reason}".rstrip()


def route_table(routes: Iterable[RouteView]) -> Table:
    """Return the table of routes and their engines."""
    table = Table("ROUTE", "ENGINE", "ID", "STATE", box=None, pad_edge=False, header_style="bold")
    table.add_column("SHARE", justify="right")
    for route in routes:
        total = sum(target.weight for target in route.engines)
        for target in route.engines:
            share = f"{100 * target.weight / total:.4g}%"
            state = target.state or "-"
            table.add_row(escape(route.name), escape(target.engine), target.engine_id or "-", state, share)
        if route.fallback:
            table.add_row(escape(route.name), escape(route.fallback), "", "", "fallback")
    return table


def device_table(devices: Iterable[Device]) -> Table:
    """Return the table of devices and the engines on each device."""
    table = Table("DEVICE", "NAME", box=None, pad_edge=False, header_style="bold")
    for name in ("USED", "TOTAL", "USABLE", "LOAD", "TEMP"):
        table.add_column(name, justify="right")
    for name in ("ENGINE", "MODEL"):
        table.add_column(name)
    for name in ("MEMORY", "RESERVED"):
        table.add_column(name, justify="right")
    for device in devices:
        engines = [
            (engine.id, escape(engine.name), size(engine.memory_bytes), _size(engine.reserved_bytes))
            for engine in device.engines
        ]
        first, *others = engines or [("", "", "", "")]
        load, temperature = device.utilization_percent, device.temperature_celsius
        table.add_row(
            device.id, escape(device.name), size(device.memory_used_bytes), size(device.memory_total_bytes),
            _size(device.memory_usable_bytes), "" if load is None else f"{load:.0f}%",
            "" if temperature is None else f"{temperature:.0f}°C", *first,
        )  # fmt: skip
        for engine in others:
            table.add_row("", "", "", "", "", "", "", *engine)
    return table


def backend_table(backends: Iterable[BackendView]) -> Table:
    """Return the table of backends."""
    table = Table("BACKEND", "KIND", "VERSION", "STATE", box=None, pad_edge=False, header_style="bold")
    table.add_column("SIZE", justify="right")
    table.add_column("ADAPTERS")
    for backend in backends:
        state = "built in" if not backend.has_environment else "installed" if backend.is_installed else "not installed"
        disk = "" if backend.disk_bytes is None else size(backend.disk_bytes)
        hot = "loaded at runtime" if backend.hot_adapters else ""
        table.add_row(backend.name, ", ".join(backend.kinds), backend.version, state, disk, hot)
    return table


def _training_facts(training: TrainingProgress, *, is_active: bool) -> list[tuple[str, object]]:
    t = training
    values = ((figure, getattr(t, figure.name)) for figure in FIGURES)
    return [
        ("activity", t.activity),
        ("step", f"{t.step} of {t.total_steps}" if t.total_steps else None),
        ("progress", bar(t.progress) if t.progress is not None else None),
        *((figure.title.lower(), figure.text(value)) for figure, value in values if value is not None),
        ("held-out before", _number(t.heldout_loss_before, 4)),
        ("held-out after", _number(t.heldout_loss, 4)),
        ("eta", eta_text(t.eta_seconds) if is_active else None),
        ("checkpoint", None if t.checkpoint_step is None else f"step {t.checkpoint_step}"),
        ("forked from", t.forked_from and f"step {t.forked_at_step} of {t.forked_from.replace('task-', 'engine-')}"),
        *(("change", change) for change in t.changes),
        *(("warning", warning) for warning in t.warnings),
    ]


def bar(share: float) -> str:
    """Format a share as a bar and a percentage."""
    filled = round(share * _BAR_CELLS)
    return f"{'█' * filled}{'░' * (_BAR_CELLS - filled)} {100 * share:3.0f}%"


def size(size_bytes: float) -> str:
    """Format a size with a unit."""
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f}{unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f}GB"


def _size(size_bytes: float | None) -> str:
    return "" if size_bytes is None else size(size_bytes)


def _training_cells(engine: EngineView) -> tuple[str, str, str]:
    training = engine.training
    if training is None:
        return "", "", ""
    progress = bar(training.progress) if training.progress is not None else ""
    return progress, _number(training.loss, 4) or "", eta_text(training.eta_seconds) if engine.state == "running" else ""


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
