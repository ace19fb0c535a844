"""Count the transitions that this control plane has written."""

import threading
from collections import Counter

from sage.llm.client.types import EngineState
from sage.llm.control_plane.states import TRANSITIONS
from sage.llm.control_plane.store.records import EngineRecord


class TransitionCounts:
    """The numbers of transitions, and the total time that engines spent in each state. This class is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Keys: the states before and after a transition.
        self.numbers: Counter[tuple[EngineState, EngineState]] = Counter(
            {(before, after): 0 for before, states in TRANSITIONS.items() for after in states}
        )
        self.durations_seconds = dict.fromkeys(EngineState, 0.0)  #: total time in each state

    def add(self, before: EngineRecord, after: EngineRecord) -> None:
        """Count a transition between two records of the same engine."""
        seconds = max(0.0, (after.state_at - before.state_at).total_seconds())
        with self._lock:
            self.numbers[before.state, after.state] += 1
            self.durations_seconds[before.state] += seconds
