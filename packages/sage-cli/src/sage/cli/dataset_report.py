"""Create the report of `dataset check`: counts, token lengths, truncated samples and duplicates."""

import contextlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

from sage.common.counting import counted
from sage.common.errors import DatasetError, ModelNotFound, SageError
from sage.libs.finetune.data.findings import Findings
from sage.libs.finetune.data.linting import DatasetReport, Parse, read_samples
from sage.libs.finetune.data.samples import Fault

_BUCKETS = 8
_BAR_CELLS = 30
_SHOWN_DUPLICATES = 5


@dataclass(frozen=True)
class Measured:
    """Token counts, or the reason why the tokens could not be counted."""

    tokenizer: str
    cutoff_tokens: int
    lengths: list[int]
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    problem: str | None = None
    error: SageError | None = None
    findings: Findings = field(default_factory=Findings)
    refused: list[Fault] = field(default_factory=list)

    def raise_for_unusable(self) -> None:
        """Raise `error` if it is set."""
        if self.error:
            raise self.error


def measure(report: DatasetReport, model: str, cutoff: int, parse: Parse, train_on: Any) -> Measured:
    """Apply a model's chat template to the samples, and count the tokens.

    If the tokens cannot be counted, `problem` of the result contains the reason.
    """
    if not report.sample_count:
        return Measured(model, cutoff, [], problem="the dataset has no samples")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hide the output of libraries that convert a model
            from sage.libs.finetune.data.checking import as_chats, load_encoder

            encoder = load_encoder(model, cutoff, train_on)
    except (ModelNotFound, ImportError) as error:
        return Measured(model, cutoff, [], problem=str(error))
    except SageError as error:
        return Measured(model, cutoff, [], problem=error.message, error=error)
    counts: dict[str, Any] = {"findings": encoder.findings, "refused": encoder.faults}
    samples = as_chats(read_samples(DatasetReport(report.path), parse))
    try:
        counts["trained_tokens"] = sum(sequence.trained_tokens for sequence in encoder.encode(samples))
    except DatasetError as error:
        if encoder.faults:
            problem = f"the model or its chat template rejects {counted(len(encoder.faults), 'sample')}"
            return Measured(model, cutoff, [], problem=problem, **counts)
        if not encoder.lengths and not encoder.untrained:
            return Measured(model, cutoff, [], problem="the samples are prompts without answers")
        return Measured(model, cutoff, [], problem=error.message, error=error, **counts)
    return Measured(model, cutoff, list(encoder.lengths), truncated=encoder.truncated, dropped=encoder.dropped, **counts)


def describe(report: DatasetReport, measured: Measured, *, as_json: bool) -> str:
    """Return the report as text, or as JSON."""
    if as_json:
        return json.dumps(_as_dict(report, measured), indent=2)
    formats = ", ".join(f"{count} {name}" for name, count in report.formats.items()) or "none"
    lines = [
        f"{report.path}: {counted(report.sample_count, 'sample')} ({formats}), "
        f"{counted(report.assistant_turns, 'assistant turn')}, "
        f"{counted(len(report.faults) + len(measured.refused), 'fault')}, {counted(len(report.duplicates), 'duplicate')}",
        *(f"  {again} has the same content as {first.place}" for again, first in report.duplicates[:_SHOWN_DUPLICATES]),
        *(f"  {file} is not used, because it belongs to another split" for file in report.skipped_files),
        *(f"{finding.severity}: {finding} {finding.hint}".rstrip() for finding in measured.findings),
    ]
    if measured.problem:
        return "\n".join([*lines, f"tokens were not counted with {measured.tokenizer}: {measured.problem}"])
    total = sum(measured.lengths)
    return "\n".join([
        *lines,
        f"tokens with {measured.tokenizer}: {total}, of which {measured.trained_tokens} are trained; "
        f"shortest {min(measured.lengths)}, longest {max(measured.lengths)}, mean {total / len(measured.lengths):.0f}",
        *_histogram(measured.lengths),
        f"cutoff {measured.cutoff_tokens}: {counted(measured.truncated, 'token sequence')} truncated, "
        f"{measured.dropped} dropped, because nothing of the answer is left",
    ])  # fmt: skip


def _histogram(lengths: list[int]) -> list[str]:
    width = max(1, -(-(max(lengths) + 1) // _BUCKETS))
    counts = [0] * (max(lengths) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    return [
        f"  {i * width:>6}–{(i + 1) * width - 1:<6} {'█' * round(_BAR_CELLS * count / max(counts)):<{_BAR_CELLS}} {count}"
        for i, count in enumerate(counts)
    ]


def _as_dict(report: DatasetReport, measured: Measured) -> dict[str, object]:
    tokens = None if measured.problem else {
        "tokenizer": measured.tokenizer,
        "total": sum(measured.lengths),
        "trained": measured.trained_tokens,
        "lengths": measured.lengths,
        "cutoff": measured.cutoff_tokens,
        "truncated_samples": measured.truncated,
        "dropped_samples": measured.dropped,
    }  # fmt: skip
    return {
        "path": str(report.path),
        "samples": report.sample_count,
        "formats": dict(report.formats),
        "assistant_turns": report.assistant_turns,
        "files": [str(file) for file in report.files],
        "skipped_files": [str(file) for file in report.skipped_files],
        "faults": [_fault(fault) for fault in [*report.faults, *measured.refused]],
        "duplicates": [[again.line, first.line] for again, first in report.duplicates],
        "tokens": tokens,
        "findings": measured.findings.as_dicts(),
    }


def _fault(fault: Fault) -> dict[str, object]:
    origin = fault.origin
    return {"path": str(origin.path), origin.unit: origin.line, "message": fault.message, "hint": fault.hint}
