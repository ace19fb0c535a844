"""Run `sage llm model export`: find the model to export, and show the progress."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sage.cli import daemon, extras, render
from sage.cli.installing import interruptible
from sage.common.errors import ConfigError
from sage.common.model_names import absolute_name
from sage.libs.models.export.exporting import Report, export_model
from sage.libs.models.export.formats import OPENVINO_PRECISIONS, PRECISIONS, ExportFormat, LlamaCpp, OpenVino

_PRECISIONS = {
    ExportFormat.GGUF: PRECISIONS, ExportFormat.OLLAMA: PRECISIONS, ExportFormat.OPENVINO: OPENVINO_PRECISIONS,
}  # fmt: skip


def run_export(source: str, format_: str, output: Path, precision: str | None) -> None:
    """Export a model or an adapter into a new folder.

    source: an engine's id, a folder, or a model's name. For an engine's id, the engine's training result is exported. If the
    engine has no training result, its model is exported.
    """
    wanted = ExportFormat(format_)
    known = _PRECISIONS.get(wanted, {})
    if precision and precision not in known:
        raise ConfigError(
            code="config_invalid",
            message=f"The format '{format_}' does not support --quantize {precision}.",
            hint=f"Values for this format: {', '.join(known)}." if known else "Omit --quantize.",
        )
    llama_cpp = LlamaCpp(_interpreter("llamacpp", "A GGUF file")) if known is PRECISIONS else None
    open_vino = OpenVino(_interpreter("openvino", "OpenVINO's format")) if known is OPENVINO_PRECISIONS else None
    with interruptible(), _progress() as report:
        export_model(
            _model_of(source), wanted, output, precision=precision, llama_cpp=llama_cpp, open_vino=open_vino, report=report
        )


def _model_of(source: str) -> str:
    if not source.startswith("engine-"):
        return absolute_name(source, Path.cwd())
    engine = daemon.connect().get_engine(source)
    return engine.output_dir or engine.model


def _interpreter(backend: str, what: str) -> Path:
    extras.require("sage.llm.control_plane", what)
    from sage.llm.control_plane.backends import environments

    return Path(environments.interpreter(backend))


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    steps: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("")

        def report(step: str, size_bytes: int) -> None:
            bar.update(task, description=f"{step}  {render.size(size_bytes)}")
            if bar.disable and step not in steps:
                steps.append(step)
                typer.echo(f"{step} …", err=True)

        yield report
