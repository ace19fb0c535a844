"""The commands `sage gateway …`."""

from typing import Annotated

import typer

from sage.common.errors import GatewayUnreachable

app = typer.Typer(no_args_is_help=True)


@app.command("start")
def start(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: loopback.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default: 8889.")] = None,
) -> None:
    """Start the gateway in the background, if it does not run yet."""
    from sage.cli import daemon

    before = daemon.find_process()
    process = daemon.start(host, port)
    already = " already" if before == process else ""
    typer.echo(f"The gateway runs{already} (PID {process.pid or 'unknown'}) at {daemon.find_client().base_url}.")


@app.command("stop")
def stop() -> None:
    """End the gateway; engines and training runs go on without it."""
    from sage.cli import daemon

    typer.echo("The gateway is stopped; engines go on." if daemon.stop() else "No gateway ran.")


@app.command("status")
def status(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say where the gateway is; exit code 3 if none answers."""
    import json

    from sage.cli import daemon

    client = daemon.find_client()
    health = client.health()
    if health.get("service") != "sage-gateway":
        raise GatewayUnreachable(code="not_a_gateway", message=f"What answers at {client.base_url} is not a SAGE gateway.")
    daemon.refuse_foreign(client, health)
    told = {"url": client.base_url, "version": health["version"], "pid": health["pid"], "log": str(daemon.log_path())}
    typer.echo(json.dumps(told) if json_ else "\n".join(f"{name:<8} {value}" for name, value in told.items()))


@app.command("logs")
def logs(tail: Annotated[int, typer.Option(min=0, help="How many of the last lines.")] = 100) -> None:
    """Print the log of the gateway in the background."""
    from sage.cli import daemon
    from sage.common.logs import tail_lines

    for line in tail_lines(daemon.log_path(), tail):
        typer.echo(line)
