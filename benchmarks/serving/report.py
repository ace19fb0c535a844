"""Write the results as JSON and as Markdown tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from machine import results as path_of

from serving.measuring import Result, Row, median


def write(results: Sequence[Result], machine: str, what: str) -> str:
    """Write `serving.json` and `serving.md`; return the text of `serving.md`."""
    content = {"machine": machine, "what": what, "backends": [asdict(result) for result in results]}
    path_of("serving.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join(_lines(results, machine, what)) + "\n"
    path_of("serving.md").write_text(text)
    return text


def _lines(results: Sequence[Result], machine: str, what: str) -> Iterator[str]:
    yield f"{machine}. {what}"
    yield ""
    yield "| backend | precision | models | at once | tokens/s, direct | gateway | ratio | first token, direct | gateway |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for result in results:
        rows = {(row.models, row.at_once, row.path): row for row in result.rows}
        for models, at_once in dict.fromkeys((row.models, row.at_once) for row in result.rows):
            direct, through = rows[models, at_once, "direct"], rows[models, at_once, "gateway"]
            name = f"{result.backend} {result.version}"
            yield f"| {name} | {result.precision} | {models} | {at_once} | {_cells(direct, through)} |"
        if result.reason:
            yield f"| {result.backend} {result.version} | {result.precision} | | | {result.reason} | | | | |"
    yield ""
    yield "| backend | start of the base | start of an adapter | first token of the adapter | peak memory |"
    yield "|---|---|---|---|---|"
    for result in results:
        if not result.reason:
            how = "" if result.is_shared else " (on a separate server)"
            yield (
                f"| {result.backend} {result.version} | {_seconds(result.start_seconds)} "
                f"| {_seconds(median(result.add_seconds))}{how} | {_seconds(median(result.add_first_token_seconds))} "
                f"| {(result.peak_bytes or 0) / 1e9:.2f} GB |"
            )


def _cells(direct: Row, through: Row) -> str:
    if not direct.tokens_per_second or not through.tokens_per_second:
        return f"{direct.reason or through.reason} | | | |"
    speeds = f"{direct.tokens_per_second:.1f} | {through.tokens_per_second:.1f}"
    ratio = f"{through.tokens_per_second / direct.tokens_per_second:.2f}"
    return f"{speeds} | {ratio} | {_seconds(direct.first_token_seconds)} | {_seconds(through.first_token_seconds)}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s"
