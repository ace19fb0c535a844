"""Findings about valid samples: content that a model would not learn, or would learn wrongly."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sage.common.counting import counted
from sage.common.errors import DatasetError

#: Maximum number of places and maximum number of details stored per finding.
_KEPT = 5


class Severity(StrEnum):
    """Effect of a finding on a run."""

    WARNING = "warning"  #: the model would learn wrongly; the run fails unless warnings are allowed
    NOTE = "note"  #: information only


class Code(StrEnum):
    """Kinds of findings."""

    ANSWER_LOST = "answer_lost"
    REASONING_LOST = "reasoning_lost"
    CALLS_LOST = "calls_lost"
    TOOLS_LOST = "tools_lost"
    MESSAGE_LOST = "message_lost"
    NO_END_TOKEN = "no_end_token"  # noqa: S105
    PROMPT_DIFFERS = "prompt_differs"
    DOUBLE_BOS = "double_bos"
    FLAG_IGNORED = "flag_ignored"
    FIELD_IGNORED = "field_ignored"
    NOTHING_TRAINED = "nothing_trained"
    END_NOT_CONFIGURED = "end_not_configured"


_W, _N = Severity.WARNING, Severity.NOTE
#: Severity, description and hint of each kind.
_MEANING: dict[Code, tuple[Severity, str, str]] = {
    Code.ANSWER_LOST: (_W, "the chat template leaves out text of the answer", "Use a model whose template keeps the text."),
    Code.REASONING_LOST: (_W, "the chat template leaves out the answer's reasoning", "Write the reasoning into content."),
    Code.CALLS_LOST: (_W, "the chat template leaves out tool calls", "Use a model whose template renders tool calls."),
    Code.TOOLS_LOST: (_W, "the chat template leaves out the tools", "Use a model whose template renders tools."),
    Code.MESSAGE_LOST: (_W, "the chat template leaves out text of a message before the answer", "Fix the message."),
    Code.NO_END_TOKEN: (_W, "no end token is trained, so generation would not stop", "Set the tokenizer's eos_token."),
    Code.PROMPT_DIFFERS: (
        _W,
        "the prompt of the served model ends with text that is not in the training data",
        "Add the reasoning to the answers.",
    ),
    Code.DOUBLE_BOS: (_W, "the sequence begins with two BOS tokens", "Remove BOS from the text."),
    Code.FLAG_IGNORED: (_W, "a field that looks like a weight or flag is ignored", 'Use "weight": 0 to exclude a turn.'),
    Code.FIELD_IGNORED: (_N, "fields are ignored", ""),
    Code.NOTHING_TRAINED: (_N, "the sample is omitted, because it has no tokens to train on", ""),
    Code.END_NOT_CONFIGURED: (
        _N,
        "the model's generation_config.json does not list the token that ends answers",
        "SAGE stops at this token, but other servers possibly do not.",
    ),
}


@dataclass
class Finding:
    """The findings of one kind, with the positions of the first affected samples."""

    code: Code
    count: int = 0  #: number of samples; 0 if the finding is about the model
    places: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        """Severity of this kind of finding."""
        return _MEANING[self.code][0]

    @property
    def hint(self) -> str:
        """Hint on how to solve the problem; "" if there is no hint."""
        return _MEANING[self.code][2]

    def __str__(self) -> str:
        details = f" ({', '.join(self.details)})" if self.details else ""
        if not self.count:
            return f"{_MEANING[self.code][1]}{details}."
        more = " …" if self.count > len(self.places) else ""
        first, *others = self.places
        # Omit the name of the file in every place except the first.
        file = first[: max(first.rfind(":"), first.rfind(" ")) + 1]
        places = ", ".join([first, *(place.removeprefix(file) for place in others)])
        return f"{counted(self.count, 'sample')}: {_MEANING[self.code][1]}{details}: {places}{more}."

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as a dict for JSON."""
        kept = {"count": self.count, "places": self.places, "details": self.details}
        return {"code": self.code, "severity": self.severity, "message": str(self), "hint": self.hint, **kept}


class Findings:
    """All findings of a dataset, by code."""

    def __init__(self, found: Iterable[dict[str, Any]] = ()) -> None:
        """found: findings as returned by `as_dicts`."""
        each = (Finding(Code(f["code"]), f["count"], [*f["places"]], [*f["details"]]) for f in found)
        self._found = {finding.code: finding for finding in each}
        self._last_places: dict[Code, str] = {}

    def add(self, code: Code, place: object, *details: str) -> None:
        """Add a finding about a sample. Repeated findings of the same kind about a sample are counted once."""
        finding = self._found.setdefault(code, Finding(code))
        finding.details += [detail for detail in details if detail not in finding.details][: _KEPT - len(finding.details)]
        if str(place) != self._last_places.get(code):
            self._last_places[code] = str(place)
            finding.count += 1
            if len(finding.places) < _KEPT:
                finding.places.append(str(place))

    def add_of_model(self, code: Code, detail: str) -> None:
        """Add a finding about the model itself."""
        self._found[code] = Finding(code, details=[detail])

    def __iter__(self) -> Iterator[Finding]:
        """Yield the warnings first, then the notes."""
        return iter(sorted(self._found.values(), key=lambda finding: (finding.severity is Severity.NOTE, finding.code)))

    def __len__(self) -> int:
        return len(self._found)

    @property
    def warnings(self) -> list[Finding]:
        """The findings with severity WARNING."""
        return [finding for finding in self if finding.severity is Severity.WARNING]

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the findings as dicts for JSON."""
        return [finding.as_dict() for finding in self]

    def raise_for_warnings(self, path: object, model: str) -> None:
        """Raise DatasetError if there are warnings."""
        if warnings := self.warnings:
            hints = " ".join(dict.fromkeys(finding.hint for finding in warnings))
            raise DatasetError(
                code="dataset_warnings",
                message=f"The model would not learn all samples of {path} correctly. {' '.join(map(str, warnings))}",
                hint=f"{hints} `sage llm dataset show {path} --model {model}` shows the text to train on; "
                "`--allow-warnings` trains despite the warnings.",
                param="dataset_path",
            )
