"""The commands `sage llm dataset …`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """The training methods, repeated here so that `--help` does not import sage.libs."""

    sft = "sft"
    dpo = "dpo"
    orpo = "orpo"
    kto = "kto"
    grpo = "grpo"


class TrainOn(StrEnum):
    """The parts of a chat on which the loss is computed, repeated here so that `--help` does not import sage.libs."""

    assistant = "assistant"
    last_turn = "last_turn"
    all = "all"


app = typer.Typer(no_args_is_help=True)
DatasetFile = Annotated[Path, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, or a folder with such files.")]
Model = Annotated[str, typer.Option(help="Model whose tokenizer and chat template are used.")]
Cutoff = Annotated[int, typer.Option(min=8, help="Maximum tokens of a sample; longer samples are truncated.")]
TrainedOn = Annotated[TrainOn, typer.Option(help="Parts of a chat on which the loss is computed.")]
LearntBy = Annotated[Method, typer.Option(help="Training method that will use the dataset.")]


@app.command("check")
def check(
    file: DatasetFile,
    model: Model = "smollm2-135m-instruct",
    max_seq_length: Cutoff = 512,
    train_on: TrainedOn = TrainOn.assistant,
    method: LearntBy = Method.sft,
    allow_warnings: Annotated[bool, typer.Option("--allow-warnings", help="Exit with code 0 despite warnings.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all errors and warnings with their line numbers, and count the samples.

    The exit code is 1 if the dataset has errors or no samples. Without --allow-warnings, warnings also cause exit code 1.
    """
    from sage.cli.dataset_report import describe, measure
    from sage.libs.finetune.data.linting import check_dataset
    from sage.libs.finetune.data.preferences import parser_of

    parse = parser_of(method.value)
    report = check_dataset(file, parse=parse)
    measured = measure(report, model, max_seq_length, parse, train_on.value)
    for fault in [*report.faults, *measured.refused]:
        typer.echo(str(fault), err=json_)
    typer.echo(describe(report, measured, as_json=json_))
    if report.faults or measured.refused or not report.sample_count:
        raise typer.Exit(1)
    measured.raise_for_unusable()
    if measured.findings.warnings and not allow_warnings:
        raise typer.Exit(1)


@app.command("show")
def show(
    file: DatasetFile,
    model: Model = "smollm2-135m-instruct",
    line: Annotated[int | None, typer.Option(min=1, help="Number of the line (or record) to show; the first is 1.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of samples to show.")] = 3,
    max_seq_length: Cutoff = 512,
    train_on: TrainedOn = TrainOn.assistant,
    method: LearntBy = Method.sft,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show samples with the chat template applied, with visible special tokens and with trained tokens in colour."""
    import contextlib
    import io
    import itertools

    from sage.cli import dataset_view, render
    from sage.libs.finetune.data.checking import as_chats, load_encoder
    from sage.libs.finetune.data.linting import DatasetReport, read_samples
    from sage.libs.finetune.data.preferences import parser_of

    with contextlib.redirect_stderr(io.StringIO()):  # hide the output of libraries that convert a model
        encoder = load_encoder(model, max_seq_length, train_on.value)
    report = DatasetReport(file)
    samples = as_chats(read_samples(report, parser_of(method.value)))
    chosen = list(itertools.islice((sample for sample in samples if line in (None, sample.origin.line)), limit))
    if not chosen:
        dataset_view.raise_for_missing(report, line)
    dataset_view.show(chosen, encoder, render.stdout(), as_json=json_)
