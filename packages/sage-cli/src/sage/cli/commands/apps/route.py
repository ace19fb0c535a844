"""The commands `sage route …`."""

from typing import Annotated

import typer

from sage.common.errors import ConfigError

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_MAX_DIGITS = 7


@app.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="Name of the route. Requests give this name as the model.")],
    engines: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE[=WEIGHT]…", help="Id, name or model of each engine; WEIGHT: relative share of the requests."
        ),
    ],
    fallback: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="Engine to use if no other engine of the route can answer.")
    ] = None,
    json_: Json = False,
) -> None:
    """Send the requests for a model name to an engine, or split the requests among several engines by weight.

    Example: `sage route set prod new=10 old=90`. Requests with the same `user` field are sent to the same engine.
    """
    from sage.cli import daemon

    weights = dict(map(_weight, engines))
    if len(weights) < len(engines):
        hint = "For a larger share of the requests, use a weight: ENGINE=2."
        raise ConfigError(code="config_invalid", message="An engine is listed twice.", hint=hint)
    route = daemon.connect().set_route(name, weights, fallback)
    for target in route.engines:
        if target.engine_id is None:
            typer.echo(f"Warning: no active engine has the id, name or model '{target.engine}'.", err=True)
    names = ", ".join(target.engine for target in route.engines)
    typer.echo(route.model_dump_json(indent=2) if json_ else f"Requests for '{route.name}' are sent to: {names}.")


def _weight(text: str) -> tuple[str, int]:
    engine, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1
    if not engine or not weight.isdecimal() or len(weight) > _MAX_DIGITS:
        raise ConfigError(
            code="config_invalid",
            message=f"'{text}' does not have the form ENGINE or ENGINE=WEIGHT.",
            hint="Example: assistant=90",
        )
    return engine, int(weight)


@app.command("list")
def list_(json_: Json = False) -> None:
    """List the routes, with the state of their engines."""
    from sage.cli import daemon, render

    routes = daemon.connect().list_routes()
    if json_:
        import json

        typer.echo(json.dumps([route.model_dump(mode="json") for route in routes], indent=2))
    else:
        render.stdout().print(render.route_table(routes))


@app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="Name of the route.")]) -> None:
    """Delete a route; its engines are not changed."""
    from sage.cli import daemon

    daemon.connect().remove_route(name)
    typer.echo(f"The route '{name}' is removed.", err=True)
