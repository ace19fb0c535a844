"""The commands `sage llm engine …`."""

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from sage.cli.training_options import with_training_options
from sage.common.errors import ConfigError

app = typer.Typer(no_args_is_help=True)

EngineId = Annotated[str, typer.Argument(help="The engine's id.", metavar="ENGINE")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_WATCH_SECONDS = 1.0


class Kind(StrEnum):
    """The engine kinds; a test holds them to SUPPORTED_ENGINE_KINDS."""

    llm = "llm"
    embedding = "embedding"
    finetune = "finetune"


@app.command("start")
@with_training_options
def start(
    model: Annotated[str, typer.Argument(help="Folder, name in the models folder, or hub id.")],
    engine_kind: Annotated[Kind, typer.Option(help="What the engine does.")] = Kind.llm,
    name: Annotated[str | None, typer.Option(help="Name in requests; default: the model as given.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the engine; default: a free one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="llm: auto, fp32 or bf16.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="llm: length of an answer, unless a request says.")] = None,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Stay until the end, or return at once; default: until it works."),
    ] = None,
    json_: Json = False,
    **training: Any,
) -> None:
    """Start an engine; its id is all that stands on stdout.

    Returns when the engine answers, or when its training has begun; where that fails, with exit code 1.
    """
    options = {key: value for key, value in (("dtype", dtype), ("max_tokens", max_tokens)) if value is not None}
    start_engine(model, engine_kind.value, {**options, **training}, name=name, port=port, wait=wait, json=json_)


def start_engine(
    model: str,
    kind: str,
    options: dict[str, Any],
    *,
    name: str | None = None,
    port: int | None = None,
    wait: bool | None = None,
    json: bool = False,
    announce: str = "{id}",
) -> None:
    """Start an engine, say its id, and wait as long as asked."""
    from pathlib import Path

    from sage.cli import daemon, waiting
    from sage.libs.models.resolve import absolute_name

    _check_given(model, kind, options)
    named = absolute_name(model, Path.cwd())
    is_path = named != model or named.startswith("/")
    client = daemon.connect()

    def begin(options: dict[str, Any]) -> Any:
        return client.start_engine(
            model=str(Path(named).resolve()) if is_path else model,
            engine_kind=kind,
            options=options,
            port=port,
            name=name or (Path(named).name if is_path and kind != Kind.finetune else None),
        )

    with waiting.interrupts_noted() as interrupted:  # else an engine could start without its id being printed
        engine = begin(options)
    if interrupted.noted:
        raise waiting.left(engine.id)
    if kind == Kind.finetune and wait is not False and is_interactive():
        engine = _confirmed(client, engine, lambda: begin({**options, "allow_warnings": True}))
    if not json:
        typer.echo(announce.format(id=engine.id))
        sys.stdout.flush()
    if wait is not False:
        engine = waiting.until_running(client, engine.id)
        if kind != Kind.finetune:
            talk = f"; talk to it: `sage llm chat {engine.name}`" if kind == Kind.llm else ""
            typer.echo(f"Serving '{engine.name}' at {client.base_url}/v1{talk}.", err=True)
    if wait:
        engine = waiting.until_ended(client, engine.id)
        typer.echo(ending(engine), err=True)
        if engine.state == "failed":
            raise waiting.failure(engine)
    if json:
        typer.echo(engine.model_dump_json(indent=2))


def _check_given(model: str, kind: str, options: dict[str, Any]) -> None:
    if not model:  # a variable that is not set, and not the working folder
        raise ConfigError(code="config_invalid", message="The model's name is empty.", hint="Give a name or a folder.")
    for field, flag in (("dataset_path", "--dataset"), ("output_dir", "--output")):
        if kind == Kind.finetune and field not in options:
            raise ConfigError(code="option_missing", message=f"A finetune engine needs {flag}.", param=flag)


def is_interactive() -> bool:
    """Return whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _confirmed(client: Any, engine: Any, begin_again: Callable[[], Any]) -> Any:
    """Return the engine, or another one if its dataset has warnings and the user wants to train all the same."""
    from sage.cli import waiting

    engine = waiting.until_begun(client, engine.id)
    if engine.state != "failed" or not engine.reason or engine.reason.code != "dataset_warnings":
        return engine
    typer.echo(f"{engine.reason.message}\n  {engine.reason.hint}", err=True)
    if not typer.confirm("Train all the same?", err=True):
        return engine
    client.remove_engine(engine.id)
    return begin_again()


@app.command("list")
def list_(
    json_: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh it until Ctrl-C.")] = False,
) -> None:
    """List all engines."""
    from sage.cli import daemon, render

    client = daemon.connect()
    if json_:
        import json

        typer.echo(json.dumps([engine.model_dump(mode="json") for engine in client.list_engines()], indent=2))
        return
    if not watch:
        render.stdout().print(render.engine_table(client.list_engines()))
        return
    from rich.live import Live

    with Live(render.engine_table(client.list_engines()), console=render.stdout(), auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_SECONDS)
            live.update(render.engine_table(client.list_engines()), refresh=True)


@app.command("status")
def status(engine_id: EngineId, json_: Json = False) -> None:
    """Show all that is known of an engine."""
    from sage.cli import daemon, render

    engine = daemon.connect().get_engine(engine_id)
    typer.echo(engine.model_dump_json(indent=2) if json_ else "\n".join(render.engine_lines(engine)))


@app.command("logs")
def logs(
    engine_id: EngineId,
    tail: Annotated[int, typer.Option(min=0, help="How many of the last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the engine has ended.")] = False,
) -> None:
    """Print an engine's log."""
    from sage.cli import daemon

    client = daemon.connect()
    if follow:
        for chunk in client.follow_logs(engine_id, tail):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        return
    for line in client.get_logs(engine_id, tail):
        typer.echo(line)


@app.command("events")
def events(
    engine_id: EngineId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the engine has ended.")] = False,
    json_: Json = False,
) -> None:
    """Print an engine's life: every state with its time, actor and reason."""
    from sage.cli import daemon

    for event in daemon.connect().events(engine_id, follow=follow):
        if json_:
            typer.echo(event.model_dump_json())
        else:
            step = f"{event.before or '·'} → {event.after}"
            typer.echo(f"{event.at:%Y-%m-%d %H:%M:%S}  {step:<22} {event.actor:<10} {event.reason}".rstrip())


@app.command("stop")
def stop(
    engine_id: EngineId,
    force: Annotated[bool, typer.Option(help="Kill it: nothing since the last checkpoint is saved.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until all is saved.")] = True,
) -> None:
    """Stop an engine; a training run saves a checkpoint and leaves a model that loads."""
    from sage.cli import daemon, waiting

    client = daemon.connect()
    before = client.get_engine(engine_id)
    engine = client.stop_engine(engine_id, force=force)
    if before.state in ("stopped", "completed", "failed"):
        typer.echo(f"{engine_id} was {before.state} already. {ending(engine)}")
        return
    if wait:
        engine = waiting.until_ended(client, engine_id)
        typer.echo(ending(engine))
        if engine.state == "failed" and not force:
            raise waiting.failure(engine)


@app.command("resume")
def resume(
    engine_id: EngineId,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Stay until the end, or return at once; default: until it works."),
    ] = None,
) -> None:
    """Go on with an engine that was stopped or has failed, exactly where it was saved."""
    from sage.cli import daemon, waiting

    client = daemon.connect()
    engine = client.resume_engine(engine_id)
    typer.echo(engine.id)
    if wait is not False:
        waiting.until_running(client, engine_id)
    if wait:
        typer.echo(ending(waiting.until_ended(client, engine_id)), err=True)


@app.command("remove")
def remove(engine_id: EngineId) -> None:
    """Forget an engine that has ended, with its log and checkpoints; its output folder stays."""
    from sage.cli import daemon

    daemon.connect().remove_engine(engine_id)
    typer.echo(f"{engine_id} is removed.", err=True)


def ending(engine: Any) -> str:
    """Return in a sentence how an engine ended and what it left."""
    training = engine.training
    if training is None:
        return f"{engine.id} is {engine.state}."
    saved = f", checkpoint {engine.run_dir}/checkpoint-{training.checkpoint_step}" if training.checkpoint_step else ""
    if engine.state == "failed":
        return f"{engine.id} is failed{saved}."
    steps = f" at step {training.step} of {training.total_steps}" if training.total_steps else ""
    before, after = training.heldout_loss_before, training.heldout_loss
    heldout = f" Held-out loss {before:.4f} → {after:.4f}." if before is not None and after is not None else ""
    return f"{engine.id} is {engine.state}{steps}: result in {engine.output_dir}{saved}.{heldout}"
