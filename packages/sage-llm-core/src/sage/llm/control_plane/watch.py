"""Measure with the monotonic clock how long an engine has been in its state, has not answered, or has been idle.

The time between two observations is added only up to a limit, so that a suspension of the control plane is not counted.
"""

from dataclasses import dataclass
from datetime import datetime

from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord


@dataclass
class Watch:
    """The measured durations of one engine, updated at each observation."""

    state: EngineState
    looked_at_seconds: float = 0.0  #: time.monotonic() at the last observation
    state_seconds: float = 0.0
    silent_seconds: float = 0.0  #: time in state `running` without an answer to the health check
    ended_seconds: float = 0.0  #: time since a process that is still alive reported the end of its work
    seen_alive: bool = False  #: whether this control plane has observed a living process of the engine
    served_as: str | None = None
    served_seconds: float = 0.0  #: time since the server loaded the current version of the adapter
    last_request_at: datetime | None = None
    idle_seconds: float = 0.0  #: time in the current state without a new request
    is_stop_sent: bool = False  #: whether this control plane has sent the stop signal in the engine's current state

    def look(self, engine: EngineRecord, observed: Observed | None, now_seconds: float, limit_seconds: float) -> None:
        """Add the time since the last call to the durations that continue, and reset the other durations.

        observed: None if the engine could not be observed. Then `silent_seconds` and `ended_seconds` are not increased.
        limit_seconds: maximum time to add.
        """
        passed_seconds = min(now_seconds - self.looked_at_seconds, limit_seconds)
        self.looked_at_seconds = now_seconds
        self.served_seconds = self.served_seconds + passed_seconds if engine.served_as == self.served_as else 0.0
        self.served_as = engine.served_as
        is_idle = engine.state is self.state and engine.last_request_at == self.last_request_at
        self.idle_seconds = self.idle_seconds + passed_seconds if is_idle else 0.0
        self.last_request_at = engine.last_request_at
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
