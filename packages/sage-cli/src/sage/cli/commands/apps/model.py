"""The commands `sage llm model …`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models in the models folder and in installed packages."""
    from sage.libs.models.catalog import list_models

    models = list_models()
    if json_:
        import json

        typer.echo(json.dumps([{**vars(model), "path": str(model.path)} for model in models], indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from sage.cli import render

    table = Table("NAME", "KIND", "SIZE", "PATH", box=None, pad_edge=False, header_style="bold")
    for model in models:
        table.add_row(escape(model.name), model.kind, render.size(model.size_bytes), escape(str(model.path)))
    render.stdout().print(table)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that contains a model (safetensors or GGUF) or an adapter.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the imported model, for example org/name; default: the folder's name.")
    ] = None,
) -> None:
    """Check a model and copy it into the models folder."""
    from sage.libs.models.catalog import import_model

    target = import_model(folder, name or folder.absolute().name)
    typer.echo(f"Imported to {target}.", err=True)


class Format(StrEnum):
    """The export formats, repeated here so that `--help` does not import the library."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"
    openvino = "openvino"
    ollama = "ollama"


class Precision(StrEnum):
    """The precisions of GGUF files and of OpenVINO's format, repeated here so that `--help` does not import the library."""

    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"
    none = "none"
    int8 = "int8"
    int4 = "int4"


@app.command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="ENGINE_OR_FOLDER", help="What to export: engine id, folder, or model name.")
    ],
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Export format. adapter: PEFT's format; merged: safetensors (an adapter is merged into its base model); "
            "gguf: a file for llama.cpp; openvino: files for OpenVINO GenAI; ollama: a GGUF file and a Modelfile.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="New folder for the exported files.")],
    quantize: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the weights. Default for gguf and ollama: the model's precision. Values for openvino: none "
            "(fp32, the default), int8, int4."
        ),
    ] = None,
) -> None:
    """Export a model or an adapter for other programs, with a model card. After Ctrl-C, incomplete files are removed."""
    from sage.cli import extras

    extras.require("sage.libs.models.export", "An export")
    from sage.cli.exporting import run_export

    run_export(source, format_.value, output, quantize and quantize.value)
    typer.echo(f"Exported to {output}.", err=True)
