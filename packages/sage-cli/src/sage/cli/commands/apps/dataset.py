"""The commands `sage llm dataset …`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """How a run learns; as the library has it, which is not imported here."""

    sft = "sft"
    dpo = "dpo"
    orpo = "orpo"
    kto = "kto"
    grpo = "grpo"


app = typer.Typer(no_args_is_help=True)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, or a folder of them.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer counts the tokens.")] = "smollm2-135m-instruct",
    max_seq_length: Annotated[int, typer.Option(min=8, help="Cutoff of the run, in tokens.")] = 512,
    method: Annotated[Method, typer.Option(help="What it is to be learnt by.")] = Method.sft,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every fault with its line, and what the dataset holds; exit code 1 where it cannot be trained on."""
    from sage.cli.dataset_report import describe, measure
    from sage.libs.finetune.data.linting import check_dataset
    from sage.libs.finetune.data.preferences import parser_of

    report = check_dataset(file, parse=parser_of(method.value))
    for fault in report.faults:
        typer.echo(str(fault), err=json_)
    measured = measure(report, model, max_seq_length)
    typer.echo(describe(report, measured, as_json=json_))
    if report.faults or not report.sample_count:
        raise typer.Exit(1)
    measured.raise_for_unusable()
