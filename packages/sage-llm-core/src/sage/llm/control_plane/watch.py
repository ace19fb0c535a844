"""How long an engine has been in its state, silent, or about to leave, by a clock that nobody can set.

The time between two looks counts up to a limit only: a control plane that was itself suspended for a minute has not
waited for its engines in that minute. After a restart, all durations begin anew.
"""

from dataclasses import dataclass

from sage.llm.client.types import EngineState


@dataclass
class Watch:
    """What is measured of one engine, from look to look."""

    state: EngineState
    looked_at: float = 0.0  #: of time.monotonic()
    state_seconds: float = 0.0  #: in its state
    silent_seconds: float = 0.0  #: without an answer, though it runs
    ended_seconds: float = 0.0  #: with a process, though its work has ended

    def look(self, now: float, state: EngineState, limit_seconds: float, *, silent: bool, ended: bool) -> None:
        """Count the time since the last look, up to a limit, for what was so then and is so now."""
        passed = min(now - self.looked_at, limit_seconds)
        self.looked_at = now
        if state is not self.state:
            self.state, self.state_seconds, self.silent_seconds, self.ended_seconds = state, 0.0, 0.0, 0.0
            return
        self.state_seconds += passed
        self.silent_seconds = self.silent_seconds + passed if silent else 0.0
        self.ended_seconds = self.ended_seconds + passed if ended else 0.0
