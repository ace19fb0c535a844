"""The commands `sage llm engine …`."""

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from sage.cli.commands.apps.prune import prune
from sage.cli.training_options import with_training_options
from sage.common.errors import ConfigError

app = typer.Typer(no_args_is_help=True)

EngineId = Annotated[str, typer.Argument(help="The engine's id.", metavar="ENGINE")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IdleStop = Annotated[
    float | None,
    typer.Option(
        metavar="MINUTES",
        help="Unload the engine after this number of minutes without requests; the next request reloads it.",
    ),
]
Serve = Annotated[bool, typer.Option("--serve", help="For finetune: serve the trained model when the run is completed.")]
ServeAs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Name of the trained model in requests. Default: the value of --name if --name is given, otherwise the name of "
        "the output folder.",
    ),
]
ServeCheckpoints = Annotated[
    bool, typer.Option("--serve-checkpoints", help="For finetune: serve the newest checkpoint during training.")
]
Wait = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait",
        help="With --wait, the command returns when the engine has ended; with --no-wait, when the engine is validated; "
        "by default, when the engine serves or trains.",
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Any other option of the backend; may be repeated.")
]


class Busy(StrEnum):
    """What to do if not enough memory is free. The values are repeated here so that `--help` does not import the client."""

    wait = "wait"
    preempt = "preempt"
    share = "share"
    fail = "fail"


OnBusyOption = Annotated[
    Busy | None,
    typer.Option(
        "--on-busy", help="What to do if not enough memory is free; default: the setting on_busy ('wait' unless changed)."
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(min=-100, max=100, help="Priority in the queue: engines with a higher number come first; default: 0."),
]
Devices = Annotated[
    str | None, typer.Option(metavar="LIST", help="Devices that the engine may use, for example cuda:0,cuda:1 or cpu.")
]
MemoryGb = Annotated[
    float | None, typer.Option(help="Memory to reserve, in GB (10^9 bytes); default: an estimate from the model.")
]
NotBefore = Annotated[
    str | None, typer.Option(metavar="TIME", help="Start at this time or later: HH:MM, or a date and time (ISO 8601).")
]


class Kind(StrEnum):
    """The engine kinds, repeated here so that `--help` does not import the client."""

    llm = "llm"
    embedding = "embedding"
    finetune = "finetune"


class State(StrEnum):
    """The engine states, repeated here so that `--help` does not import the client."""

    validating = "validating"
    queued = "queued"
    starting = "starting"
    running = "running"
    paused = "paused"
    stopping = "stopping"
    stopped = "stopped"
    completed = "completed"
    failed = "failed"


class Policy(StrEnum):
    """The restart policies, repeated here so that `--help` does not import the client."""

    no = "no"
    on_failure = "on-failure"
    unless_stopped = "unless-stopped"


class Quantize(StrEnum):
    """Values of the option `quantize`."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


@app.command("start")
@with_training_options
def start(
    model: Annotated[str, typer.Argument(help="Model: a folder, a name in the models folder, or a hub id.")],
    engine_kind: Annotated[Kind, typer.Option(help="Kind of engine.")] = Kind.llm,
    name: Annotated[str | None, typer.Option(help="Model name in requests; default: the MODEL argument.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the engine; default: any free port.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Program that runs the engine; default: the fastest installed backend for the model.")
    ] = None,
    restart_policy: Annotated[
        Policy | None, typer.Option(help="When to restart the engine automatically; default: the setting restart_policy.")
    ] = None,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Maximum number of automatic restarts in a row; default: 5.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Note to store with the engine; may be repeated.")
    ] = None,
    dedicated: Annotated[
        bool,
        typer.Option(
            "--dedicated", help="Run the engine in its own process; if MODEL is an adapter, merge it into its base model."
        ),
    ] = False,
    merge_in_background: Annotated[
        bool,
        typer.Option(
            "--merge-in-background",
            help="For an adapter: serve the adapter at once, and merge it into its base model in the background.",
        ),
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="For llm: data type of the weights: auto, fp32 or bf16.")] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="For llm: maximum tokens of prompt plus answer; default: the model's maximum.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="For llm: maximum number of answers generated at the same time.")] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="For llm: quantization of the weights (answers are faster, but less exact); default: none."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="For llm: maximum tokens of an answer, if the request sets no maximum.")
    ] = None,
    on_busy: OnBusyOption = None,
    priority: Priority = None,
    devices: Devices = None,
    memory_gb: MemoryGb = None,
    not_before: NotBefore = None,
    idle_stop: IdleStop = None,
    serve: Serve = False,
    serve_as: ServeAs = None,
    serve_checkpoints: ServeCheckpoints = False,
    option: Options = None,
    wait: Wait = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """Start an engine and print its id.

    By default, the command waits until the engine serves or trains. The exit code is 2 if an option is wrong, and 1 if the
    engine fails.
    """
    from sage.cli.starting import admission_request, serve_request, start_engine

    serving = {"dtype": dtype, "context_tokens": context_tokens, "slots": slots,
               "quantize": quantize and quantize.value, "max_tokens": max_tokens}  # fmt: skip
    options = {**{key: value for key, value in serving.items() if value is not None}, **further_options(option)}
    request = {"name": name, "port": port, "backend": backend, "restart_policy": restart_policy and restart_policy.value,
               "max_restarts": max_restarts,
               "dedicated": dedicated or None, "merge_in_background": merge_in_background or None,
               "idle_stop_minutes": idle_stop}  # fmt: skip
    request |= admission_request(on_busy and on_busy.value, priority, devices, memory_gb, not_before)
    request |= serve_request(serve=serve, name=serve_as, checkpoints=serve_checkpoints)
    given = {key: value for key, value in request.items() if value is not None}
    notes = {"metadata": dict(map(_note, metadata))} if metadata else {}
    start_engine(model, engine_kind.value, {**options, **training}, request={**given, **notes}, wait=wait, json=json_)


def _note(text: str) -> tuple[str, str]:
    return _pair(text, "metadata", "team=search")


def further_options(given: list[str] | None) -> dict[str, str | int]:
    """Return KEY=VALUE options as a dictionary. Raises ConfigError for invalid options.

    Values that contain only digits become integers.
    """
    return {key: int(value) if value.isdecimal() else value for key, value in map(_option, given or ())}


def _option(text: str) -> tuple[str, str]:
    return _pair(text, "option", "threads=2")


def _pair(text: str, name: str, example: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ConfigError(
            code="config_invalid", message=f"--{name} '{text}' does not have the form KEY=VALUE.",
            hint=f"Example: --{name} {example}", param=name,
        )  # fmt: skip
    return key, value


@app.command("list")
def list_(
    json_: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh the list until Ctrl-C.")] = False,
    all_: Annotated[bool, typer.Option("--all", "-a", help="Show all stopped, completed and failed engines.")] = False,
    limit: Annotated[
        int, typer.Option(min=0, max=1000, help="Maximum number of stopped, completed and failed engines to show.")
    ] = 20,
    state: Annotated[list[State] | None, typer.Option(help="Show only engines in this state; may be repeated.")] = None,
    kind: Annotated[list[Kind] | None, typer.Option(help="Show only engines of this kind; may be repeated.")] = None,
) -> None:
    """List the active engines and the newest settled ones (stopped, completed or failed)."""
    from sage.cli import daemon, listing, render

    client = daemon.connect()
    selection = listing.Selection(states=tuple(state or ()), kinds=tuple(kind or ()), settled_limit=None if all_ else limit)
    engines, has_more = listing.select(client, selection)
    if json_:
        import json

        typer.echo(json.dumps([engine.model_dump(mode="json") for engine in engines], indent=2))
    elif watch:
        from sage.cli.watching import watch as refresh

        refresh(lambda: render.engine_table(listing.select(client, selection)[0]))
    else:
        render.stdout().print(render.engine_table(engines))
    if has_more:
        typer.echo("There are older engines that have ended; --all shows them.", err=True)


@app.command("status")
def status(engine_id: EngineId, json_: Json = False) -> None:
    """Show the details of an engine."""
    from sage.cli import daemon, render

    engine = daemon.connect().get_engine(engine_id)
    typer.echo(engine.model_dump_json(indent=2) if json_ else "\n".join(render.engine_lines(engine)))


@app.command("logs")
def logs(
    engine_id: EngineId,
    tail: Annotated[int, typer.Option(min=0, help="Number of lines to print from the end of the log.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the engine has ended.")] = False,
) -> None:
    """Print an engine's log."""
    from sage.cli import daemon

    client = daemon.connect()
    for line in client.follow_logs(engine_id, tail) if follow else client.get_logs(engine_id, tail):
        typer.echo(line)
        if follow:
            sys.stdout.flush()


@app.command("events")
def events(
    engine_id: EngineId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until the engine has ended.")] = False,
    json_: Json = False,
) -> None:
    """Print an engine's events: each state with its time, actor and reason."""
    from sage.cli import daemon, render

    client = daemon.connect()
    for event in client.follow_events(engine_id) if follow else client.get_events(engine_id):
        typer.echo(event.model_dump_json() if json_ else render.event_line(event))


@app.command("stop")
def stop(
    engine_id: EngineId,
    force: Annotated[
        bool, typer.Option(help="Kill the engine; a training run loses the steps since its last checkpoint.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the engine has stopped.")] = True,
) -> None:
    """Stop an engine. A training run first saves a checkpoint and the model trained so far."""
    from sage.cli import daemon, waiting
    from sage.cli.render import ending

    client = daemon.connect()
    before = client.get_engine(engine_id)
    engine = client.stop_engine(engine_id, force=force)
    if before.state in ("stopped", "completed", "failed"):
        typer.echo(f"{engine_id} was already {before.state}. {ending(engine)}")
        return
    if wait:
        engine = waiting.until_settled(client, engine_id)
        typer.echo(ending(engine))
        if engine.state == "failed" and not force:
            raise waiting.failure(engine)


@app.command("pause")
def pause(engine_id: EngineId) -> None:
    """Pause an engine and free its memory. A training run saves a checkpoint first."""
    from sage.cli import daemon, waiting

    client = daemon.connect()
    client.pause_engine(engine_id)
    engine = waiting.until_paused(client, engine_id)
    typer.echo(f"{engine_id} is {engine.state}.", err=True)


@app.command("resume")
def resume(engine_id: EngineId, wait: Wait = None) -> None:
    """Start a stopped, failed or paused engine again. A training run continues from its last checkpoint."""
    from sage.cli import daemon, waiting
    from sage.cli.render import ending

    client = daemon.connect()
    engine = client.resume_engine(engine_id)
    typer.echo(engine.id)
    sys.stdout.flush()
    waiting.until_validated(client, engine_id)
    if wait is not False:
        waiting.until_running(client, engine_id)
    if wait:
        typer.echo(ending(waiting.until_settled(client, engine_id)), err=True)


@app.command("checkpoint")
def checkpoint(
    engine_id: EngineId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the checkpoint is saved.")] = True,
) -> None:
    """Save a checkpoint of a training run after its current step.

    If the run was started with --serve, the checkpoint is also served.
    """
    from sage.cli import daemon, waiting

    client = daemon.connect()
    engine = client.checkpoint_engine(engine_id)
    if wait:
        step = waiting.until_checkpoint(client, engine)
        typer.echo(f"{engine.run_dir}/checkpoint-{step}")


@app.command("remove")
def remove(engine_id: EngineId) -> None:
    """Delete an engine that has ended, and its log and checkpoints. The output folder is kept."""
    from sage.cli import daemon

    daemon.connect().remove_engine(engine_id)
    typer.echo(f"{engine_id} is removed.", err=True)


app.command("prune")(prune)
