"""The commands `sage llm engine update` and `sage llm engine fork`, for training runs."""

from typing import Annotated

import typer

from sage.cli.commands.apps.engine import EngineId, Json, Wait, further_options
from sage.cli.commands.apps.engine import app as app

LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Total number of steps.")]
Patience = Annotated[
    int | None,
    typer.Option(min=0, help="End the run after this number of evaluations without improvement; 0: no early stopping."),
]


@app.command("update")
def update(
    engine_id: EngineId,
    learning_rate: LearningRate = None,
    max_steps: MaxSteps = None,
    early_stopping_patience: Patience = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the run uses the new options.")] = True,
) -> None:
    """Change options of a training run from its next step on.

    If the run has no process, the options change when the run is resumed.
    """
    from sage.cli import daemon, waiting

    given = {"learning_rate": learning_rate, "max_steps": max_steps, "early_stopping_patience": early_stopping_patience}
    client = daemon.connect()
    accepted = client.change_training(engine_id, **{name: value for name, value in given.items() if value is not None})
    engine = client.get_engine(engine_id)
    if engine.state not in ("queued", "starting", "running"):
        typer.echo(f"{engine_id} is {engine.state}. The options change when the run is resumed.", err=True)
    elif wait:
        typer.echo(waiting.until_changed(client, engine_id, accepted.revision))


@app.command("fork")
def fork(
    engine_id: EngineId,
    output: Annotated[str, typer.Option(help="New or empty folder for the trained adapter or model.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint to continue from; default: the newest checkpoint.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new engine; default: the same name as ENGINE.")] = None,
    learning_rate: LearningRate = None,
    lr_scheduler: Annotated[str | None, typer.Option(help="Schedule of the learning rate.")] = None,
    max_steps: MaxSteps = None,
    early_stopping_patience: Patience = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Another option to change; may be repeated.")
    ] = None,
    wait: Wait = None,
    json_: Json = False,
) -> None:
    """Start a training run that continues from a checkpoint of another run, and print the id of the new engine.

    Options that are omitted have the same values as in the other run.
    """
    from sage.cli import daemon
    from sage.cli.starting import absolute_path, follow_start

    given = {"learning_rate": learning_rate, "lr_scheduler": lr_scheduler, "max_steps": max_steps,
             "early_stopping_patience": early_stopping_patience}  # fmt: skip
    options = {**{key: value for key, value in given.items() if value is not None}, **further_options(option)}
    client = daemon.connect()
    engine = client.fork_engine(engine_id, step=step, name=name, output_dir=absolute_path(output), options=options)
    follow_start(client, engine, wait=wait, json=json_)
