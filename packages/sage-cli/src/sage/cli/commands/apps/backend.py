"""The commands `sage backend …`."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the backend.", metavar="NAME")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """List the backends that the gateway knows, and whether each is installed."""
    from sage.cli import daemon, render

    backends = daemon.connect().backends()
    if json_:
        import json

        typer.echo(json.dumps([backend.model_dump(mode="json") for backend in backends], indent=2))
    else:
        render.stdout().print(render.backend_table(backends))


@app.command("install")
def install(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print pip's output.")] = False,
    json_: Json = False,
) -> None:
    """Install a backend into a separate environment. After Ctrl-C, the incomplete environment is removed."""
    import sys

    from sage.cli import extras, render

    extras.require("sage.llm.control_plane", "Managing backends on this machine")
    from sage.cli.installing import interruptible, progress
    from sage.llm.control_plane.backends import environments, installation

    environment = environments.chosen(name)
    if not environment.is_installed:
        need = (
            f"{render.size(environment.download_bytes)} to download, and {render.size(environment.disk_bytes)} of disk space"
        )
        typer.echo(f"Installing {environment.requirement} for the device {environments.device()} needs {need}.", err=True)
        if sys.stdin.isatty() and not yes:
            typer.confirm(f"Install {name} into {environment.folder}?", abort=True, err=True)
    with interruptible(), progress(environment, is_verbose=verbose) as report:
        is_new = installation.install(environment, report)
    typer.echo(f"The backend {name} is{'' if is_new else ' already'} installed.", err=True)
    _print_json(json_, name=name, version=environment.version, folder=str(environment.folder), changed=is_new)


@app.command("remove")
def remove(name: Name, json_: Json = False) -> None:
    """Delete the environment of a backend. The command fails if an engine uses the backend."""
    from sage.cli import extras

    extras.require("sage.llm.control_plane", "Managing backends on this machine")
    from sage.llm.control_plane.backends import environments, installation

    existed = installation.remove(environments.chosen(name), lambda line: typer.echo(line, err=True))
    typer.echo(f"The backend {name} is removed." if existed else f"The backend {name} is not installed.", err=True)
    _print_json(json_, name=name, changed=existed)


@app.command("doctor")
def doctor(name: Annotated[str | None, typer.Argument(help="Check only this backend.")] = None, json_: Json = False) -> None:
    """Check whether installed backends can run. The exit code is 1 if a backend cannot run."""
    from sage.cli import doctor, extras

    extras.require("sage.llm.control_plane", "Managing backends on this machine")
    doctor.report(doctor.backends(name), as_json=json_)


@app.command("benchmark")
def benchmark(
    model: Annotated[str, typer.Argument(help="Folder or name of the model to serve.", metavar="MODEL")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer, in tokens.")] = 64,
    json_: Json = False,
) -> None:
    """Measure the speed of each installed backend (takes minutes). New engines without --backend use the fastest backend."""
    from sage.cli import extras

    extras.require("sage.llm.control_plane", "A benchmark of the backends on this machine")
    from dataclasses import asdict
    from datetime import UTC, datetime

    from sage.cli import benchmarking, daemon, render
    from sage.llm.control_plane.backends import environments, speeds

    figures = list(benchmarking.measure(daemon.connect(), model, max_tokens))
    measured = {figure.backend: figure.many_tokens_per_second for figure in figures if figure.many_tokens_per_second}
    if measured:
        date = datetime.now(UTC).date().isoformat()
        path = speeds.save_speeds(speeds.Speeds(environments.device(), speeds.processor(), model, date, measured))
        typer.echo(
            f"The measured speeds are saved in {path}. New engines without --backend use the fastest backend.", err=True
        )
    if json_:
        _print_json(True, model=model, backends=[asdict(figure) for figure in figures])
    else:
        render.stdout().print(benchmarking.table(figures))
    if not measured:
        raise typer.Exit(1)


def _print_json(wanted: bool, **facts: object) -> None:
    if wanted:
        import json

        typer.echo(json.dumps(facts))
