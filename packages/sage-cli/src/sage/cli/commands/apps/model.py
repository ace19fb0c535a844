"""The commands `sage llm model …`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that have a name: those in the models folder and those of installed packages."""
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
    folder: Annotated[Path, typer.Argument(help="Folder of a model (safetensors or GGUF) or an adapter.")],
    name: Annotated[str | None, typer.Option(help="New name, such as org/name; default: the folder's name.")] = None,
) -> None:
    """Check a model and copy it into the models folder."""
    from sage.libs.models.catalog import import_model

    target = import_model(folder, name or folder.absolute().name)
    typer.echo(f"Imported to {target}.", err=True)
