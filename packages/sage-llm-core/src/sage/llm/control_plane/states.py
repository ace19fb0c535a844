"""The life of an engine, as data."""

from collections.abc import Mapping
from enum import StrEnum


class EngineState(StrEnum):
    """Where an engine is in its life."""

    QUEUED = "queued"  #: waits for its turn to be started
    STARTING = "starting"  #: its process exists, it does not answer or train yet
    RUNNING = "running"  #: it answers, or trains
    PAUSED = "paused"  #: it gave its memory to another and will be queued again
    STOPPING = "stopping"  #: it was asked to stop and saves what it has
    STOPPED = "stopped"  #: it ended because it was asked to
    COMPLETED = "completed"  #: it did all that it was asked to
    FAILED = "failed"  #: it ended otherwise; the reason says how


_S = EngineState
#: Every legal step; anything else is a bug and raises IllegalTransition.
TRANSITIONS: Mapping[EngineState, frozenset[EngineState]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.STOPPED, _S.FAILED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.STOPPING, _S.STOPPED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.STOPPING, _S.STOPPED, _S.COMPLETED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.STOPPING, _S.STOPPED, _S.FAILED}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.COMPLETED, _S.FAILED}),
    _S.STOPPED: frozenset({_S.QUEUED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset({_S.QUEUED}),
}
#: Nothing happens to an engine in one of these until someone asks.
SETTLED = frozenset({_S.STOPPED, _S.COMPLETED, _S.FAILED})


class IllegalTransition(RuntimeError):
    """A step that the table does not have."""


def check_transition(before: EngineState, after: EngineState) -> None:
    """Raise IllegalTransition where the table does not have the step."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"{before} → {after}")
