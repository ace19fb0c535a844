"""Estimate the remaining time of a run from the duration of its steps."""

from collections import deque

_MIN_STEPS = 10
_WINDOW_STEPS = 20


class ProgressMeter:
    """Measures throughput and remaining time.

    The remaining time is estimated without the first step, which is slower because of its warm-up.
    """

    def __init__(self, remaining_steps: int, closing_seconds: float = 0.0) -> None:
        """remaining_steps: steps left to train.  closing_seconds: expected duration of the remaining evaluations."""
        self.remaining_steps = remaining_steps
        self.closing_seconds = closing_seconds
        self._steps = 0
        self._seconds = 0.0
        self._window: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)

    def add(self, tokens: int, seconds: float) -> None:
        """Add one optimizer step with its number of tokens and its duration."""
        self.remaining_steps -= 1
        self._steps += 1
        if self._steps > 1:
            self._seconds += seconds
        self._window.append((tokens, seconds))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the latest steps; None if no tokens were counted."""
        tokens = sum(tokens for tokens, _ in self._window)
        return tokens / max(sum(seconds for _, seconds in self._window), 1e-9) if tokens else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the run ends; None if too few steps are done for an estimate."""
        if self._steps < _MIN_STEPS:
            return None
        return self.remaining_steps * self._seconds / (self._steps - 1) + self.closing_seconds
