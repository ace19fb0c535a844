"""The commands `sage llm queue …`."""

from typing import Annotated

import typer

app = typer.Typer(invoke_without_command=True)


@app.callback()
def show(context: typer.Context, json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the engines that wait for memory, in the order of the queue."""
    if context.invoked_subcommand is not None:
        return
    from sage.cli import daemon, render

    engines = daemon.connect().queue()
    if json_:
        import json

        typer.echo(json.dumps([engine.model_dump(mode="json") for engine in engines], indent=2))
    else:
        render.stdout().print(render.queue_table(engines))


@app.command("move")
def move(
    engine_id: Annotated[str, typer.Argument(help="The engine's id.", metavar="ENGINE")],
    position: Annotated[int, typer.Argument(min=1, help="New position in the queue, from 1. Priorities take precedence.")],
) -> None:
    """Move a waiting engine to another position in the queue."""
    from sage.cli import daemon

    daemon.connect().move_engine(engine_id, position)
