"""The states of an engine and the transitions between them."""

from collections.abc import Mapping

from sage.llm.client.types import EngineState

_S = EngineState
#: Every legal transition. Any other transition is a bug and raises IllegalTransition.
TRANSITIONS: Mapping[EngineState, frozenset[EngineState]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.STOPPED, _S.FAILED}),
    _S.QUEUED: frozenset({_S.STARTING, _S.PAUSED, _S.STOPPED, _S.FAILED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPING, _S.STOPPED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.STOPPING, _S.STOPPED, _S.COMPLETED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.STOPPING, _S.STOPPED, _S.FAILED}),
    _S.STOPPING: frozenset({_S.PAUSED, _S.STOPPED, _S.COMPLETED, _S.FAILED}),  # PAUSED: the engine stopped for a pause
    _S.STOPPED: frozenset({_S.VALIDATING}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset({_S.VALIDATING, _S.QUEUED}),  # QUEUED: the restart policy restarts the engine
}


class IllegalTransition(RuntimeError):
    """A transition that `TRANSITIONS` does not contain."""


def check_transition(before: EngineState, after: EngineState) -> None:
    """Raise IllegalTransition if `TRANSITIONS` does not contain the transition from `before` to `after`."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"{before} → {after}")
