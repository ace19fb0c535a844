"""Entry point of the command `sage`."""

import sys
from typing import Annotated, NoReturn

import typer

from sage.cli.commands.apps import backend, backup, gateway, llm, route, service, webhook
from sage.common.errors import Conflict, SageError

app = typer.Typer(
    name="sage",
    help="Fine-tune and serve language models on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(llm.app, name="llm", help="Fine-tune, serve and chat; manage engines, models and datasets.")
app.add_typer(route.app, name="route", help="Set, list and remove routes; a route maps a model name to engines.")
app.add_typer(gateway.app, name="gateway", help="Start, stop and check the process that manages the engines.")
app.add_typer(webhook.app, name="webhook", help="Check the URLs that receive messages about engines.")
app.add_typer(backend.app, name="backend", help="Install, check and compare the programs that run engines.")
app.add_typer(service.app, name="service", help="Run the gateway as a systemd user service.")
app.command("backup")(backup.save)
app.command("restore")(backup.restore)


@app.command("studio")
def studio(port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the dashboard on 127.0.0.1.")] = 8890) -> None:
    """Start the dashboard. Ctrl-C stops the dashboard; engines continue to run."""
    import os
    import socket

    from sage.cli import daemon, extras

    extras.require("sage.studio", "The dashboard")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError as error:
            raise Conflict(
                code="port_taken",
                message=f"The dashboard cannot listen on 127.0.0.1:{port}: {error.strerror}.",
                hint="Choose another port with --port.",
            ) from error
    client = daemon.connect()
    key = {"SAGE_API_KEY": client.api_key} if client.api_key else {}
    argv = [sys.executable, "-m", "sage.studio", "--gateway-url", client.base_url, "--port", str(port)]
    os.execve(sys.executable, argv, {**os.environ, **key})


@app.command("gpu")
def gpu(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh the table until Ctrl-C.")] = False,
) -> None:
    """Show the GPUs and the main memory: load, temperature, and the memory that each engine uses."""
    from sage.cli import daemon, render

    client = daemon.connect()
    if json_:
        import json

        typer.echo(json.dumps([device.model_dump(mode="json") for device in client.devices()], indent=2))
    elif watch:
        from sage.cli.watching import watch as refresh

        refresh(lambda: render.device_table(client.devices()))
    else:
        render.stdout().print(render.device_table(client.devices()))


@app.command("doctor")
def doctor(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this installation and show what is missing. The exit code is 1 if a check fails."""
    from sage.cli import doctor

    doctor.report(doctor.everything(), as_json=json_)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sage {version('sage-cli')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit codes after an error: 1 failed, 2 wrong usage, 3 no gateway, 130 Ctrl-C."""
    try:
        app()
    except SageError as error:
        _exit(error)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sage."):
            raise
        from sage.cli.extras import missing

        _exit(missing(error.name or "", "This command"))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the pipe, such as `head`, has exited
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        typer.echo(f"Error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}.", err=True)
        sys.exit(1)


def _exit(error: SageError) -> NoReturn:
    typer.echo(f"Error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"  {error.hint}", err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
