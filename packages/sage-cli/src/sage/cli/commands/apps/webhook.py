"""The commands `sage webhook …`."""

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _webhook() -> None:
    pass


@app.command("test")
def test() -> None:
    """Send a test message to each URL of the setting webhook_urls. The exit code is 1 if a message is not delivered."""
    from sage.cli import daemon

    results = daemon.connect().test_webhooks()
    for result in results:
        typer.echo(f"{result.host}: {result.problem or 'delivered'}")
    if not results:
        typer.echo("The gateway has no webhooks; docs/monitoring.md shows how to set webhook_urls.", err=True)
    if any(result.problem for result in results):
        raise typer.Exit(1)
