"""The commands `sage service …`."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.command("install")
def install(
    now: Annotated[bool, typer.Option("--now", help="Start the service now and at each login.")] = False,
) -> None:
    """Write a systemd user unit that runs the gateway. Engines continue to run if the service is stopped."""
    from sage.cli import daemon, extras, service

    extras.require("sage.llm.gateway", "A gateway on this machine")
    path = service.install()
    typer.echo(f"{path} is written.", err=True)
    if ignored := service.ignored_variables():
        typer.echo(f"The service does not use {', '.join(ignored)}: set these values in config.toml.", err=True)
    if now:
        if service.has_systemctl():
            daemon.stop()  # otherwise, a gateway that runs in the background holds the lock that the service needs
        service.enable()
        typer.echo(f"{service.UNIT} is running.", err=True)
    else:
        typer.echo(f"Start the service: `{' && '.join(service.commands())}`.", err=True)
    typer.echo("To keep the service running after you log out: `loginctl enable-linger`.", err=True)


@app.command("uninstall")
def uninstall() -> None:
    """Stop the service and remove its unit. Engines continue to run."""
    from sage.cli import service

    typer.echo(f"{service.uninstall()} is removed.", err=True)


@app.command("status")
def status(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show whether the service is installed, starts at login, and runs."""
    import json
    from dataclasses import asdict

    from sage.cli import service

    found = service.status()
    if json_:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        installed = f"installed at {service.unit_path()}" if found.is_installed else "not installed"
        typer.echo(f"{service.UNIT} is {installed}; start at login: {found.enabled}; now: {found.active}.")
