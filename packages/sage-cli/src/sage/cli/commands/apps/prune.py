"""The command `sage llm engine prune`."""

from typing import Annotated

import typer

from sage.common.counting import counted


def prune(
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Delete only engines that ended at least this number of days ago.")
    ] = 30,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also delete stopped and failed runs, which could be resumed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete old engines that have ended, with their logs and checkpoints. Output folders are kept."""
    import json

    from sage.cli import daemon, pruning, render

    client = daemon.connect()
    removals = pruning.prune(client, older_than_days=older_than, unfinished=unfinished, dry_run=dry_run)
    if json_:
        typer.echo(json.dumps([removal.content() for removal in removals], indent=2))
        return
    for removal in removals:
        engine, kept = removal.engine, f"  kept: {removal.kept_because}" if removal.kept_because else ""
        typer.echo(f"{engine.id}  {engine.state:<9}  {render.size(removal.freed_bytes):>9}  {engine.name}{kept}")
    removed = [removal for removal in removals if not removal.kept_because]
    verb = "would be deleted" if dry_run else "deleted"
    freed = render.size(sum(each.freed_bytes for each in removed))
    typer.echo(f"{counted(len(removed), 'engine')} {verb}, with {freed} of files.", err=True)
