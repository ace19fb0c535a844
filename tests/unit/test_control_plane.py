from typing import Any

import pytest
from engines import record
from hypothesis import given
from hypothesis import strategies as st

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import DEFAULT_MODEL, SETTLED, EngineKind, EngineState, Reason, Wanted
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.reconciler import Action, Effect, Limits, decide
from sage.llm.control_plane.selection import select_engine
from sage.llm.control_plane.states import TRANSITIONS, IllegalTransition, check_transition
from sage.llm.control_plane.store.store import EngineRecord
from sage.llm.control_plane.watch import Watch

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20)
DEAD = Reason(code="engine_died", message="dead")


def test_every_state_has_its_row_and_only_settled_ones_may_end_there() -> None:
    assert set(TRANSITIONS) == set(EngineState)
    for state, after in TRANSITIONS.items():
        assert after or state is S.COMPLETED
    with pytest.raises(IllegalTransition):
        check_transition(S.COMPLETED, S.RUNNING)


NEW, OLD = Watch(S.RUNNING), Watch(S.RUNNING, state_seconds=3600, ended_seconds=3600)
FINETUNE = {"kind": EngineKind.FINETUNE}
FORCE = Wanted.KILLED


@pytest.mark.parametrize(
    ("engine", "observed", "watch", "action"),
    [
        (record(), Observed(alive=False), NEW, Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=True), NEW, Action(Effect.ADOPT, S.STARTING)),
        (record(), Observed(alive=False, ended=S.STOPPED), NEW, Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=True, ended=S.STOPPED), NEW, Action()),
        (record(wanted=Wanted.STOPPED), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(wanted=FORCE), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(wanted=Wanted.STOPPED), Observed(alive=True), NEW, Action(Effect.ADOPT, S.STARTING)),
        (record(S.STARTING), Observed(alive=True), NEW, Action()),
        (record(S.STARTING), Observed(alive=True, ready=True), NEW, Action(state=S.RUNNING)),
        (record(S.STARTING), Observed(alive=False, reason=DEAD), NEW, Action(state=S.FAILED, reason=DEAD)),
        (record(S.STARTING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.RUNNING)),
        (record(S.STARTING, Wanted.STOPPED), Observed(alive=True), NEW, Action(Effect.STOP, S.STOPPING)),
        (record(S.STARTING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL, S.STOPPING)),
        (record(S.STARTING), Observed(alive=True), OLD, Action(Effect.KILL)),
        (record(S.STARTING, **FINETUNE), Observed(alive=True), OLD, Action()),
        (record(S.RUNNING), Observed(alive=True, ready=True), NEW, Action()),
        (record(S.RUNNING), Observed(alive=True), OLD, Action()),
        (record(S.RUNNING), Observed(alive=False, reason=DEAD), NEW, Action(state=S.FAILED, reason=DEAD)),
        (record(S.RUNNING, Wanted.STOPPED), Observed(alive=True, ready=True), NEW, Action(Effect.STOP, S.STOPPING)),
        (record(S.RUNNING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL, S.STOPPING)),
        (record(S.RUNNING), Observed(alive=True, orphaned=True), NEW, Action(Effect.KILL)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.COMPLETED)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.STOPPED), NEW, Action(state=S.STOPPED)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, Action()),
        (record(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), OLD, Action(Effect.KILL)),
        (record(S.RUNNING, FORCE, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=True), NEW, Action()),
        (record(S.STOPPING, FORCE), Observed(alive=True), NEW, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=False), NEW, Action(state=S.STOPPED)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=True), OLD, Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED, **FINETUNE), Observed(alive=True), OLD, Action()),
        (record(S.STOPPING, FORCE), Observed(alive=False, reason=DEAD), NEW, Action(state=S.STOPPED)),
        (record(S.STOPPING, FORCE, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, Action(state=S.COMPLETED)),
        (
            record(S.STOPPING, Wanted.STOPPED, **FINETUNE),
            Observed(alive=False, ended=S.COMPLETED),
            NEW,
            Action(state=S.COMPLETED),
        ),
    ],
)
def test_the_next_action_follows_from_what_is_wanted_and_what_is(
    engine: EngineRecord, observed: Observed, watch: Watch, action: Action
) -> None:
    assert decide(engine, observed, watch, LIMITS) == action


def test_an_engine_that_never_answers_is_failed_only_when_it_is_dead() -> None:
    assert decide(record(S.STARTING), Observed(alive=True), OLD, LIMITS) == Action(Effect.KILL)
    action = decide(record(S.STARTING), Observed(alive=False, reason=DEAD), OLD, LIMITS)
    assert (action.effect, action.state) == (Effect.NOTHING, S.FAILED)
    assert action.reason is not None
    assert action.reason.code == "start_timeout"


def test_a_run_that_was_killed_as_asked_has_failed_and_says_so() -> None:
    died = Reason(code="worker_died", message="dead", hint="`resume` goes on from checkpoint 5.")
    observed = Observed(alive=False, ended=S.FAILED, reason=died)
    action = decide(record(S.STOPPING, FORCE, **FINETUNE), observed, NEW, LIMITS)
    assert action.state is S.FAILED
    assert action.reason is not None
    assert (action.reason.code, action.reason.hint) == ("killed", died.hint)


@given(
    state=st.sampled_from([s for s in EngineState if s not in SETTLED]),
    wanted=st.sampled_from(Wanted),
    kind=st.sampled_from(EngineKind),
    alive=st.booleans(),
    ready=st.booleans(),
    orphaned=st.booleans(),
    ended=st.sampled_from([None, *SETTLED]),
    watch=st.sampled_from([NEW, OLD]),
)
def test_no_decision_is_ever_an_illegal_step(
    state: EngineState,
    wanted: Wanted,
    kind: EngineKind,
    alive: bool,
    ready: bool,
    orphaned: bool,
    ended: EngineState | None,
    watch: Watch,
) -> None:
    observed = Observed(alive=alive, ready=ready, ended=ended, orphaned=orphaned)
    action = decide(record(state, wanted, kind=kind), observed, watch, LIMITS)
    if action.state is not None:
        check_transition(state, action.state)
    if alive or orphaned:  # nothing is settled that still has a process
        assert action.state not in SETTLED


def test_a_minute_in_which_the_control_plane_itself_was_suspended_does_not_count() -> None:
    watch = Watch(S.STARTING, 100.0)
    for now in (101.0, 161.0, 162.0):  # it was stopped for a minute between the first look and the second
        watch.look(now, S.STARTING, 5, silent=True, ended=True)
    assert watch == Watch(S.STARTING, 162.0, state_seconds=7, silent_seconds=7, ended_seconds=7)
    watch.look(163.0, S.STARTING, 5, silent=False, ended=False)
    assert (watch.state_seconds, watch.silent_seconds, watch.ended_seconds) == (8, 0, 0)
    watch.look(164.0, S.RUNNING, 5, silent=True, ended=True)
    assert watch == Watch(S.RUNNING, 164.0)


def engines(*states: tuple[str, EngineState], **values: Any) -> list[EngineRecord]:
    return [record(state, id=name, last_event=i, **values) for i, (name, state) in enumerate(states)]


@pytest.mark.parametrize(
    ("states", "unresponsive", "found"),
    [
        ([("old", S.RUNNING), ("new", S.QUEUED)], "", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "", "old"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "", "new"),
        ([("old", S.RUNNING), ("new", S.STOPPING)], "", "old"),
        ([("old", S.STARTING), ("new", S.QUEUED)], "", "new"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "new", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "old", "new"),
    ],
)
@pytest.mark.parametrize("model", ["m", DEFAULT_MODEL])
def test_the_newest_that_runs_and_responds_serves_and_the_others_wait(
    states: list[tuple[str, EngineState]], unresponsive: str, found: str, model: str
) -> None:
    assert select_engine(engines(*states), model, EngineKind.LLM, lambda name: name != unresponsive).id == found


def test_the_default_model_is_the_one_that_ran_last_and_not_the_one_made_last() -> None:
    made_first = [record(S.RUNNING, id="resumed", last_event=9), record(S.RUNNING, id="new", last_event=8)]
    assert select_engine(made_first, DEFAULT_MODEL, EngineKind.LLM, lambda _: True).id == "resumed"
    assert select_engine(made_first, "m", EngineKind.LLM, lambda _: True).id == "new"


def test_the_only_engine_that_runs_and_does_not_respond_is_told_and_not_waited_for() -> None:
    with pytest.raises(Overloaded, match="does not respond"):
        select_engine(engines(("engine-a", S.RUNNING)), "m", EngineKind.LLM, lambda _: False)


def test_a_model_that_nobody_serves_is_named_with_those_that_there_are() -> None:
    with pytest.raises(NotFound, match="serves the model 'x'; there are: m"):
        select_engine(engines(("engine-a", S.RUNNING)), "x", EngineKind.LLM, lambda _: True)
    with pytest.raises(NotFound) as caught:
        select_engine([], "x" * 5000, EngineKind.LLM, lambda _: True)
    assert len(str(caught.value)) < 500
