"""Print samples with the chat template applied and with trained tokens in colour, for `dataset show`."""

import itertools
import json
from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from sage.common.counting import counted
from sage.common.errors import DatasetError
from sage.libs.finetune.data.linting import DatasetReport
from sage.libs.finetune.data.samples import Sample
from sage.libs.finetune.data.tokenizing import IGNORED, Encoded, Encoder

#: Keys: kinds of text. Values: the style, and the opening and closing brackets for a terminal without colours.
_LOOKS = {"trained": ("bold green", "⟦", "⟧"), "untrained": ("", "", ""), "cut": ("red strike", "⟨cut: ", "⟩")}
_SPECIAL_STYLE = "reverse"


def raise_for_missing(report: DatasetReport, line: int | None) -> NoReturn:
    """Raise DatasetError, because there is no sample to show. If faults are known, the error reports the faults.

    line: report only the faults of this line; None: report all faults.
    """
    report.faults = [fault for fault in report.faults if line in (None, fault.origin.line)]
    report.raise_for_faults()
    if line is None:
        message = f"No sample of the dataset {report.path} has an answer."
        raise DatasetError(code="no_answers", message=message, hint="Use a dataset with answers.")
    message = f"The dataset {report.path} has no sample with an answer on line {line}."
    hint = "Omit --line to see the first samples."
    raise DatasetError(code="line_not_found", message=message, hint=hint)


def show(samples: Iterable[Sample], encoder: Encoder, console: Console, *, as_json: bool) -> None:
    """Print samples, each with its sequences. Raises DatasetError if the chat template rejects a sample."""
    shown = [(sample, encoder.encode_whole([sample])[0]) for sample in samples]
    encoder.raise_for_faults()
    if as_json:
        console.out(json.dumps([_as_dict(*each, encoder) for each in shown], indent=2), highlight=False)
        return
    for sample, sequences in shown:
        if not sequences:
            console.print(_heading(sample, "no token is trained"))
        for sequence in sequences:
            cut = max(0, len(sequence.ids) - encoder.cutoff)
            facts = (
                f"{counted(len(sequence.ids), 'token')}, {sequence.trained_tokens} trained{f', {cut} cut' if cut else ''}"
            )
            console.print(_heading(sample, facts))
            console.print(_text(sequence, encoder, console.color_system is not None))
    for finding in encoder.findings:
        console.print(Text(f"{finding.severity}: {finding} {finding.hint}".rstrip(), style="yellow"))


def _heading(sample: Sample, facts: str) -> Text:
    return Text.assemble((str(sample.origin), "bold"), f" ({sample.format}): {facts}")


def _segments(sequence: Encoded, encoder: Encoder) -> list[tuple[str, str]]:
    kinds = ["untrained" if label == IGNORED else "trained" for label in sequence.labels[: encoder.cutoff]]
    kinds += ["cut"] * (len(sequence.ids) - len(kinds))
    runs = itertools.groupby(zip(kinds, sequence.ids, strict=True), key=lambda pair: pair[0])
    return [(kind, encoder.tokenizer.decode([token for _, token in run])) for kind, run in runs]


def _text(sequence: Encoded, encoder: Encoder, has_colours: bool) -> Text:
    text = Text()
    for kind, content in _segments(sequence, encoder):
        style, begin, end = _LOOKS[kind]
        # Escape control characters, because they could change the state of the terminal.
        visible = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in content)
        text.append(visible if has_colours else f"{begin}{visible}{end}", style)
    text.highlight_words(encoder.tokenizer.all_special_tokens, _SPECIAL_STYLE)
    return text


def _as_dict(sample: Sample, sequences: list[Encoded], encoder: Encoder) -> dict[str, Any]:
    return {
        "path": str(sample.origin.path),
        sample.origin.unit: sample.origin.line,
        "format": sample.format,
        "sequences": [
            {
                "ids": sequence.ids,
                "trained": [label != IGNORED for label in sequence.labels],
                "segments": [{"kind": kind, "text": text} for kind, text in _segments(sequence, encoder)],
            }
            for sequence in sequences
        ],
    }
