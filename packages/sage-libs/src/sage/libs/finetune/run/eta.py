"""How long a run still takes, from how long its steps took."""

from collections import deque

#: Before this many steps a run says that it is estimating.
_MIN_STEPS = 10
#: Speed is told over this many steps.
_WINDOW_STEPS = 20


class ProgressMeter:
    """Measures steps; the first of a process is left out, it warms up."""

    def __init__(self, remaining_steps: int, closing_seconds: float = 0.0) -> None:
        """remaining_steps: still to be done; closing_seconds: what is done besides, so far as it is known."""
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
        """Tokens computed a second over the last steps; None where they are not counted."""
        tokens = sum(tokens for tokens, _ in self._window)
        return tokens / max(sum(seconds for _, seconds in self._window), 1e-9) if tokens else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end, or None while too few steps are known."""
        if self._steps < _MIN_STEPS:
            return None
        return self._remaining * self._seconds / (self._steps - 1) + self.closing_seconds
