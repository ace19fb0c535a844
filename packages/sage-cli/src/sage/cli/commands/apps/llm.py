"""The commands and command groups of `sage llm`."""

from typing import Annotated, Any

import typer

from sage.cli.commands.apps import dataset, engine, model, queue, training_run
from sage.cli.training_options import with_training_options

app = typer.Typer(no_args_is_help=True)
app.add_typer(training_run.app, name="engine", help="Start, list, stop and resume engines.")
app.add_typer(queue.app, name="queue", help="List and move the engines that wait for memory.")
app.add_typer(model.app, name="model", help="List, import and export models.")
app.add_typer(dataset.app, name="dataset", help="Check and show datasets.")


@app.command("fine-tune")
@with_training_options
def fine_tune(
    base_model: Annotated[str, typer.Option(help="Model to train: a folder, a name in the models folder, or a hub id.")],
    serve: engine.Serve = False,
    serve_as: engine.ServeAs = None,
    serve_checkpoints: engine.ServeCheckpoints = False,
    on_busy: engine.OnBusyOption = None,
    priority: engine.Priority = None,
    devices: engine.Devices = None,
    memory_gb: engine.MemoryGb = None,
    not_before: engine.NotBefore = None,
    wait: engine.Wait = None,
    **training: Any,
) -> None:
    """Fine-tune a model. This command is a short form of `engine start --engine-kind finetune`."""
    from sage.cli.starting import admission_request, serve_request, start_engine

    request = serve_request(serve=serve, name=serve_as, checkpoints=serve_checkpoints)
    request |= admission_request(on_busy and on_busy.value, priority, devices, memory_gb, not_before)
    start_engine(base_model, "finetune", training, request=request, wait=wait, announce="Fine-tune engine started: {id}")
    typer.echo("Use `sage llm engine list` to monitor progress.", err=True)


@app.command("estimate")
@with_training_options
def estimate(
    model: Annotated[str, typer.Argument(help="Model: a folder, a name in the models folder, or a hub id.")],
    engine_kind: Annotated[engine.Kind, typer.Option(help="Kind of engine.")] = engine.Kind.llm,
    backend: Annotated[
        str | None, typer.Option(help="Backend to assume for the estimate; default: the fastest backend.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="For llm: data type of the weights: auto, fp32 or bf16.")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="For llm: maximum tokens of prompt plus answer.")] = None,
    slots: Annotated[int | None, typer.Option(help="For llm: maximum number of answers generated at the same time.")] = None,
    quantize: Annotated[engine.Quantize | None, typer.Option(help="For llm: quantize the weights.")] = None,
    option: engine.Options = None,
    json_: engine.Json = False,
    **training: Any,
) -> None:
    """Show how much memory an engine would need, and whether this memory is free. Use the options of `engine start`."""
    from sage.cli.estimating import show_estimate

    serving = {"dtype": dtype, "context_tokens": context_tokens, "slots": slots, "quantize": quantize and quantize.value}
    given = {key: value for key, value in serving.items() if value is not None}
    options = {**given, **engine.further_options(option), **training}
    show_estimate(model, engine_kind.value, options, backend=backend, json=json_)


@app.command("chat")
def chat(
    model: Annotated[str, typer.Argument(help="Name of a running engine.")] = "sage-default",
    message: Annotated[
        list[str] | None,
        typer.Option("--message", "-m", help="Send this message, print the answer and exit; may be repeated."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Temperature; 0: greedy decoding.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = None,
) -> None:
    """Chat with a running engine; /clear starts a new conversation, /exit or Ctrl-D exits."""
    from sage.cli import daemon
    from sage.cli.conversation import Conversation

    options = {key: value for key, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None}
    conversation = Conversation(daemon.connect(), model, system, options)
    if message:
        for text in message:
            conversation.ask(text)
    else:
        conversation.repeat()
