"""`sage llm …`: its groups, `fine-tune` and `chat`."""

from typing import Annotated, Any

import typer

from sage.cli.commands.apps import dataset, engine, model
from sage.cli.training_options import with_training_options

app = typer.Typer(no_args_is_help=True)
app.add_typer(engine.app, name="engine", help="Start, watch, stop and resume engines.")
app.add_typer(model.app, name="model", help="Models on this machine.")
app.add_typer(dataset.app, name="dataset", help="Datasets.")


@app.command("fine-tune")
@with_training_options
def fine_tune(
    base_model: Annotated[str, typer.Option(help="Folder, name in the models folder, or hub id.")],
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Stay until the end, or return at once; default: until it works."),
    ] = None,
    **training: Any,
) -> None:
    """Fine-tune a model: the same as `engine start --engine-kind finetune`."""
    announce = "Fine-tune engine started: {id}"
    engine.start_engine(base_model, "finetune", training, wait=wait, announce=announce)
    typer.echo("Use `sage llm engine list` to monitor progress.", err=True)


@app.command("chat")
def chat(
    model: Annotated[str, typer.Argument(help="Name of a served model.")] = "sage-default",
    message: Annotated[
        list[str] | None, typer.Option("--message", "-m", help="Ask this and leave; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = greedy decoding.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
) -> None:
    """Talk to a running engine; /clear forgets what was said, /exit or Ctrl-D leaves."""
    from sage.cli import daemon
    from sage.cli.conversation import Conversation

    options = {key: value for key, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None}
    conversation = Conversation(daemon.connect(), model, system, options)
    if message:
        for text in message:
            conversation.ask(text)
    else:
        conversation.repeat()
