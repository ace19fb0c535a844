"""The life of an engine, as data."""

from collections.abc import Mapping

from sage.llm.client.types import EngineState

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


class IllegalTransition(RuntimeError):
    """A step that the table does not have."""


def check_transition(before: EngineState, after: EngineState) -> None:
    """Raise IllegalTransition where the table does not have the step."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"{before} → {after}")
