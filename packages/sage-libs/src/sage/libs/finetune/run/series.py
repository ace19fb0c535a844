"""Read the steps of a run incrementally, and keep a limited number of steps in memory."""

import bisect
import threading
from collections.abc import Sequence

from sage.common.training import StepEvent, TrainingStep
from sage.libs.finetune.run.rundir import RunDirectory

#: Maximum number of steps after downsampling. If more than twice this number of steps is in memory, steps are downsampled.
KEPT_STEPS = 5_000


class StepSeries:
    """The steps of one run, read incrementally."""

    def __init__(self, run: RunDirectory, kept_steps: int = KEPT_STEPS) -> None:
        self._run, self._kept_steps = run, kept_steps
        self._offset = 0
        self._steps: list[TrainingStep] = []  # ascending step numbers, without duplicates
        self._lock = threading.Lock()

    def read(self, after: int = 0, max_points: int | None = None) -> list[TrainingStep]:
        """Return the steps after step `after`, downsampled to at most `max_points` steps."""
        with self._lock:
            for event, end in self._run.read_events(self._offset):
                self._offset = end
                if isinstance(event, StepEvent):
                    self._add(event)
            found = self._steps[bisect.bisect_right(self._steps, after, key=_number) :]
        return found if max_points is None else downsample(found, max_points)

    def _add(self, event: StepEvent) -> None:
        if self._steps and event.step <= self._steps[-1].step:  # a resumed run repeats the steps after its checkpoint
            del self._steps[bisect.bisect_left(self._steps, event.step, key=_number) :]
        self._steps.append(TrainingStep.model_validate(vars(event)))
        if len(self._steps) > 2 * self._kept_steps:
            self._steps = downsample(self._steps, self._kept_steps)


def downsample(steps: Sequence[TrainingStep], max_points: int) -> list[TrainingStep]:
    """Return at most `max_points` steps: the first, the last, and two steps from each of several ranges of equal length.

    These two steps have the lowest and the highest loss of their range. If `max_points` is 1, the last step is returned.
    """
    if len(steps) <= max_points:
        return list(steps)
    if max_points == 1:
        return [steps[-1]]
    ranges = max(0, max_points - 2) // 2
    first, last = steps[0], steps[-1]
    chosen = [first]
    for number in range(ranges):
        begin, end = (first.step + 1 + (last.step - first.step - 1) * edge // ranges for edge in (number, number + 1))
        inner = steps[bisect.bisect_left(steps, begin, key=_number) : bisect.bisect_left(steps, end, key=_number)]
        if inner:
            extremes = {step.step: step for step in (min(inner, key=_loss), max(inner, key=_loss))}
            chosen += [extremes[step] for step in sorted(extremes)]
    return [*chosen, last]


def _number(step: TrainingStep) -> int:
    return step.step


def _loss(step: TrainingStep) -> float:
    return 0.0 if step.loss is None else step.loss
