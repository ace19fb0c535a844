"""How long an engine has been in its state, silent, or ended with its process alive, by a clock that nobody can set.

The time between two looks counts up to a limit only, so that the time in which the control plane itself was suspended
does not count. If the control plane restarts, all durations begin at zero.
"""

from dataclasses import dataclass

from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord


@dataclass
class Watch:
    """What is measured of one engine, from look to look."""

    state: EngineState
    looked_at_seconds: float = 0.0  #: of time.monotonic()
    state_seconds: float = 0.0  #: in its state
    silent_seconds: float = 0.0  #: running without an answer to its health check
    ended_seconds: float = 0.0  #: alive, though its work has ended
    seen_alive: bool = False  #: this control plane has seen its process
    is_stop_sent: bool = False  #: this control plane has sent the signal to stop in this state

    def look(self, engine: EngineRecord, observed: Observed | None, now_seconds: float, limit_seconds: float) -> None:
        """Add the time since the last look, at most `limit_seconds`, to what was and still is the case.

        observed: None if it is not known what is the case; then the durations of silence and end stay as they are.
        """
        passed_seconds = min(now_seconds - self.looked_at_seconds, limit_seconds)
        self.looked_at_seconds = now_seconds
        if observed and observed.alive:
            self.seen_alive = True
        if engine.state is not self.state:
            self.state, self.is_stop_sent = engine.state, False
            self.state_seconds = self.silent_seconds = self.ended_seconds = 0.0
            return
        self.state_seconds += passed_seconds
        if observed and observed.alive:
            is_served = engine.kind is not EngineKind.FINETUNE and engine.state is EngineState.RUNNING
            is_silent = is_served and not observed.ready
            self.silent_seconds = self.silent_seconds + passed_seconds if is_silent else 0.0
            self.ended_seconds = self.ended_seconds + passed_seconds if observed.ended else 0.0
