"""The commands `sage gateway …`."""

from typing import Annotated

import typer

from sage.common.errors import GatewayUnreachable

app = typer.Typer(no_args_is_help=True)


@app.command("start")
def start(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default: 8889.")] = None,
) -> None:
    """Start the gateway in the background, unless it is running."""
    from sage.cli import daemon

    before = daemon.find_process()
    process = daemon.start(host, port)
    already = " already" if before == process else ""
    typer.echo(f"The gateway is{already} running (PID {process.pid or 'unknown'}) at {daemon.find_client().base_url}.")


@app.command("stop")
def stop() -> None:
    """Stop the gateway. Engines and training runs continue to run."""
    from sage.cli import daemon

    typer.echo("The gateway is stopped; engines continue to run." if daemon.stop() else "No gateway was running.")


@app.command("status")
def status(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the gateway's address and process. The exit code is 3 if no gateway answers."""
    import json

    from sage.cli import daemon

    client = daemon.find_client()
    health = client.health()
    if health.get("service") != "sage-gateway":
        raise GatewayUnreachable(
            code="not_a_gateway",
            message=f"The program at {client.base_url} is not a SAGE gateway.",
            hint="Set SAGE_GATEWAY_PORT to another port.",
        )
    daemon.refuse_foreign(client, health)
    facts = {"url": client.base_url, "version": health["version"], "pid": health["pid"], "log": str(daemon.log_path())}
    typer.echo(json.dumps(facts) if json_ else "\n".join(f"{name:<8} {value}" for name, value in facts.items()))


@app.command("logs")
def logs(
    tail: Annotated[int, typer.Option(min=0, help="Number of lines to print, counted from the end of the log.")] = 100,
) -> None:
    """Print the log of the gateway that runs in the background."""
    from sage.cli import daemon
    from sage.common.logs import tail_lines

    for line in tail_lines(daemon.log_path(), tail):
        typer.echo(line)
