"""From a training run's status to what the control plane reports of it."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from sage.common.errors import NotFound
from sage.common.training import TrainingProgress, TrainingStep
from sage.libs.finetune.run.status import ALIVE, RunState, RunStatus
from sage.llm.client.types import Reason

#: A run in one of these has ended.
SETTLED = (RunState.STOPPED, RunState.COMPLETED, RunState.FAILED)
#: Raised by reading a run whose files are missing or hold something else than events.
UNREADABLE = (NotFound, ValueError, KeyError, TypeError, AttributeError)


def progress_of(run: RunStatus) -> TrainingProgress:
    """Return the figures of a run."""
    figures: dict[str, Any] = {name: getattr(run, name) for name in TrainingProgress.model_fields if hasattr(run, name)}
    return TrainingProgress(
        **figures | {"warnings": list(run.warnings), "activity": run.message if run.state in ALIVE else None}
    )


def failure_of(run: RunStatus) -> Reason | None:
    """Return why a run failed, or None if it did not."""
    if run.state is not RunState.FAILED:
        return None
    return Reason(code=run.code or "failed", message=run.message or "It failed.", hint=run.hint or "")


def unreadable(error: Exception) -> Reason:
    """Return the reason of a run whose files cannot be read."""
    if isinstance(error, NotFound):
        return Reason(code=error.code, message=error.message, hint=error.hint)
    return Reason(
        code="run_unreadable",
        message=f"The run's events cannot be read: {type(error).__name__}: {error}.",
        hint="Fix or remove the line at fault in events.jsonl of its run directory.",
    )


def steps_of(events: Iterable[Mapping[str, Any]], after: int, max_points: int | None) -> list[TrainingStep]:
    """Return the steps after step `after`, evenly thinned to at most `max_points`, with the first and the last.

    Of a step that was done again after a restart, the last event counts.
    """
    steps: dict[int, TrainingStep] = {}
    for event in events:
        with contextlib.suppress(ValidationError):  # a malformed event does not hide the others
            if event["event"] == "step" and (step := TrainingStep.model_validate(event)).step > after:
                steps[step.step] = step
    found = [steps[number] for number in sorted(steps)]
    if max_points is None or len(found) <= max_points:
        return found
    stride = (len(found) - 1) / max(1, max_points - 1)
    return [found[math.floor(index * stride)] for index in range(max_points - 1)] + found[-1:]
