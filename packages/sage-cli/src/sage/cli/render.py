"""How engines look in a terminal."""

import sys
from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sage.common.progress_bar import duration, eta_text
from sage.llm.client.types import EngineView, TrainingProgress

_BAR_CELLS = 10
_STATE_STYLES = {"running": "green", "completed": "green", "failed": "red", "starting": "yellow", "stopping": "yellow"}
#: Wide enough that nothing is cut where a program reads along.
_PIPE_COLUMNS = 240


def stdout() -> Console:
    """Return the console for data: as wide as the terminal, never cut in a pipe."""
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def engine_table(engines: Iterable[EngineView]) -> Table:
    """Return the listing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ENGINE", "KIND", "MODEL", "STATE", "PROGRESS", "LOSS", "ETA", "AGE", "MEMORY", "PORT"):
        numeric = name in ("LOSS", "ETA", "AGE", "MEMORY", "PORT")
        table.add_column(
            name, no_wrap=name != "MODEL", overflow="fold" if name == "MODEL" else "ellipsis",
            justify="right" if numeric else "left",
        )  # fmt: skip
    for engine in engines:
        style = _STATE_STYLES.get(engine.state, "dim")
        table.add_row(
            engine.id, engine.kind, escape(engine.name), f"[{style}]{engine.state}[/]", *_training_cells(engine),
            duration((datetime.now(UTC) - engine.created_at).total_seconds()),
            "" if engine.memory_bytes is None else size(engine.memory_bytes),
            "" if engine.port is None else str(engine.port),
        )  # fmt: skip
    return table


def engine_lines(engine: EngineView) -> list[str]:
    """Return all that is known of one engine, a fact a line."""
    facts: list[tuple[str, object]] = [
        ("engine", engine.id), ("kind", engine.kind), ("model", engine.model), ("name", engine.name),
        ("state", engine.state), ("reason", engine.reason and f"{engine.reason.message} {engine.reason.hint}".strip()),
        ("port", engine.port), ("pid", engine.pid),
        ("memory", None if engine.memory_bytes is None else size(engine.memory_bytes)),
    ]  # fmt: skip
    if engine.training:
        facts += _training_facts(engine.training, is_active=engine.state == "running")
    facts += [("output", engine.output_dir), ("run", engine.run_dir), ("log", engine.log_path)]
    return [f"{name:<18} {value}" for name, value in facts if value is not None]


def _training_facts(training: TrainingProgress, *, is_active: bool) -> list[tuple[str, object]]:
    t = training
    return [
        ("activity", t.activity),
        ("step", f"{t.step} of {t.total_steps}" if t.total_steps else None),
        ("progress", bar(t.progress) if t.progress is not None else None),
        ("loss", _number(t.loss, 4)),
        ("token accuracy", None if t.token_accuracy is None else f"{100 * t.token_accuracy:.1f} %"),
        ("reward", None if t.reward is None else f"{t.reward:.3f}"),
        ("better answer likelier", None if t.reward_accuracy is None else f"{100 * t.reward_accuracy:.1f} % of pairs"),
        ("held-out before", _number(t.heldout_loss_before, 4)),
        ("held-out after", _number(t.heldout_loss, 4)),
        ("tokens per second", _number(t.tokens_per_second, 0)),
        ("eta", eta_text(t.eta_seconds) if is_active else None),
        ("checkpoint", None if t.checkpoint_step is None else f"step {t.checkpoint_step}"),
        *(("warning", warning) for warning in t.warnings),
    ]


def bar(share: float) -> str:
    """Return a share as a bar and a percentage."""
    filled = round(share * _BAR_CELLS)
    return f"{'█' * filled}{'░' * (_BAR_CELLS - filled)} {100 * share:3.0f}%"


def size(size_bytes: float) -> str:
    """Return a size as a person says it."""
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f}{unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f}GB"


def _training_cells(engine: EngineView) -> tuple[str, str, str]:
    training = engine.training
    if training is None:
        return "", "", ""
    progress = bar(training.progress) if training.progress is not None else ""
    return progress, _number(training.loss, 4) or "", eta_text(training.eta_seconds) if engine.state == "running" else ""


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
