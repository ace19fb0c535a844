"""The time that a run still needs, estimated from the time of its steps."""

from collections import deque

#: Steps before there is an estimate.
_MIN_STEPS = 10
#: Throughput is measured over this many steps.
_WINDOW_STEPS = 20


class ProgressMeter:
    """Measures steps; the first one of a process is not counted, since it warms up."""

    def __init__(self, remaining_steps: int, closing_seconds: float = 0.0) -> None:
        """remaining_steps: still to be done; closing_seconds: known time of the work besides the steps."""
        self._remaining = remaining_steps
        self.closing_seconds = closing_seconds
        self._steps = 0
        self._seconds = 0.0
        self._window: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)

    def add(self, tokens: int, seconds: float) -> None:
        """Count one optimizer step."""
        self._remaining -= 1
        self._steps += 1
        if self._steps > 1:
            self._seconds += seconds
        self._window.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the last steps; None if tokens are not counted."""
        tokens = sum(tokens for tokens, _ in self._window)
        return tokens / max(sum(seconds for _, seconds in self._window), 1e-9) if tokens else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the end, or None until enough steps are done."""
        if self._steps < _MIN_STEPS:
            return None
        return self._remaining * self._seconds / (self._steps - 1) + self.closing_seconds
