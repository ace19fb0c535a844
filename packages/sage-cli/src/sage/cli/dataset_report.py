"""What `dataset check` prints: counts, token lengths, what the cutoff does, duplicates."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from sage.common.errors import DatasetError, SageError
from sage.libs.finetune.data.linting import DatasetReport, read_samples

_BUCKETS = 8
_BAR_CELLS = 30
_SHOWN_DUPLICATES = 5


@dataclass(frozen=True)
class Measured:
    """Token figures, or why there are none."""

    tokenizer: str
    cutoff_tokens: int
    lengths: list[int]
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    problem: str | None = None
    error: DatasetError | None = None

    def raise_for_unusable(self) -> None:
        """Raise DatasetError where the tokens are such that no run could use them."""
        if self.error:
            raise self.error


def measure(report: DatasetReport, model: str, cutoff: int) -> Measured:
    """Count tokens with a model's tokenizer; where that cannot be had, the report says so and stands without."""
    if not report.sample_count:
        return Measured(model, cutoff, [], problem="there is no sample")
    if not report.assistant_turns and "text" not in report.formats:
        return Measured(model, cutoff, [], problem="TRL makes them of preferences")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # libraries talk while they convert a model
            from sage.libs.finetune.data.tokenizing import Encoder, ensure_chat_template
            from sage.libs.models.loading import load_tokenizer, local_folder
            from sage.libs.models.resolve import resolve_model

            tokenizer = load_tokenizer(local_folder(resolve_model(model, Path.cwd())))
        ensure_chat_template(tokenizer)
        encoder = Encoder(tokenizer, cutoff)
        trained = sum(sequence.trained_tokens for sequence in encoder.encode(read_samples(DatasetReport(report.path))))
    except DatasetError as error:
        return Measured(model, cutoff, [], problem=error.message, error=error)
    except (SageError, ImportError) as error:
        return Measured(model, cutoff, [], problem=str(error))
    return Measured(model, cutoff, list(encoder.lengths), trained, encoder.truncated, encoder.dropped)


def describe(report: DatasetReport, measured: Measured, *, as_json: bool) -> str:
    """Return the report as text for a person, or as JSON."""
    if as_json:
        return json.dumps(_as_dict(report, measured), indent=2)
    formats = ", ".join(f"{count} {name}" for name, count in report.formats.items()) or "none"
    lines = [
        f"{report.path}: {report.sample_count} samples ({formats}), {report.assistant_turns} assistant turns, "
        f"{len(report.faults)} faults, {len(report.duplicates)} duplicates",
        *(f"  {again} says the same as line {first.line}" for again, first in report.duplicates[:_SHOWN_DUPLICATES]),
    ]
    if measured.problem:
        return "\n".join([*lines, f"tokens were not counted with {measured.tokenizer}: {measured.problem}"])
    total = sum(measured.lengths)
    return "\n".join([
        *lines,
        f"tokens by {measured.tokenizer}: {total} in all, {measured.trained_tokens} trained on; "
        f"shortest {min(measured.lengths)}, longest {max(measured.lengths)}, mean {total / len(measured.lengths):.0f}",
        *_histogram(measured.lengths),
        f"cutoff {measured.cutoff_tokens}: {measured.truncated} samples are cut, {measured.dropped} lose their answer",
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
        "faults": [
            {"path": str(f.origin.path), "line": f.origin.line, "message": f.message, "hint": f.hint} for f in report.faults
        ],
        "duplicates": [[again.line, first.line] for again, first in report.duplicates],
        "tokens": tokens,
    }
