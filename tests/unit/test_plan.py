import dataclasses
import itertools
import random
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from engines import record, server
from hypothesis import given
from hypothesis import strategies as st

from sage.llm.client.types import SETTLED, DesiredState, EngineKind, EngineState, Reason, RestartPolicy
from sage.llm.control_plane.actions import Action, Launch, SendSignal, SetDesired, Transition, Validate
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.plan import Limits, Snapshot, Validation, plan
from sage.llm.control_plane.states import check_transition
from sage.llm.control_plane.store.records import EngineRecord, ServerState
from sage.llm.control_plane.watch import Watch

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20, unresponsive_seconds=30)
DEAD = Reason(code="engine_died", message="dead")
NEW, OLD = Watch(S.RUNNING), Watch(S.RUNNING, state_seconds=3600, ended_seconds=3600)
STOPPED = DesiredState.STOPPED
PAUSED, NOW = DesiredState.PAUSED, datetime.now(UTC)
IDLE_STOP: dict[str, Any] = {"idle_stop_minutes": 1.0}
FINETUNE: dict[str, Any] = {"kind": EngineKind.FINETUNE}
FORCE: dict[str, Any] = {"desired": STOPPED, "force": True}
LIVES, READY, GONE = Observed(alive=True), Observed(alive=True, ready=True), Observed(alive=False, reason=DEAD)


def of(state: EngineState, **values: Any) -> EngineRecord:
    return record(state, server_id="server-a", **values)


def planned(engine: EngineRecord, observed: Observed | None, watch: Watch = NEW, **values: Any) -> Action | None:
    servers = {"server-a": server(values.pop("server_state", ServerState.LAUNCHED))}
    seen = {engine.id: observed} if observed else {}
    fields: dict[str, Any] = {"validations": {}, **values}
    snapshot = Snapshot([engine], servers, seen, {engine.id: watch}, limits=LIMITS, **fields)
    actions = plan(snapshot)
    assert len(actions) <= 1
    return actions[0] if actions else None


def outline(action: Action | None) -> object:
    """Return the short form of an action for the tables: the state to write, the signal to send, or the action's class."""
    match action:
        case None:
            return None
        case Transition(state=state):
            return state
        case SendSignal(signal=signal):
            return signal
        case SetDesired(desired=desired):
            return desired
        case _:
            return type(action)


@pytest.mark.parametrize(
    ("engine", "observed", "watch", "expected"),
    [
        (record(), None, NEW, Launch),
        (record(restarts=3), None, NEW, None),  # it waits before it is restarted
        (record(restarts=3), None, OLD, Launch),
        (record(desired=STOPPED), None, NEW, S.STOPPED),
        (record(**FORCE), None, NEW, S.STOPPED),
        (of(S.STARTING), None, OLD, None),
        (of(S.STARTING), LIVES, NEW, None),
        (of(S.STARTING), READY, NEW, S.RUNNING),
        (of(S.STARTING), GONE, NEW, S.FAILED),
        (of(S.STARTING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, S.RUNNING),
        (of(S.STARTING, desired=STOPPED), LIVES, NEW, S.STOPPING),
        (of(S.STARTING, **FORCE), LIVES, NEW, S.STOPPING),
        (of(S.STARTING), LIVES, OLD, Signal.KILL),
        (of(S.STARTING, **FINETUNE), LIVES, OLD, None),
        (of(S.RUNNING), READY, NEW, None),
        (of(S.RUNNING), LIVES, OLD, None),
        (of(S.RUNNING), GONE, NEW, S.FAILED),
        (of(S.RUNNING), None, OLD, None),
        (of(S.RUNNING, desired=STOPPED), None, OLD, None),
        (of(S.RUNNING, desired=STOPPED), READY, NEW, S.STOPPING),
        (of(S.RUNNING, **FORCE), LIVES, NEW, S.STOPPING),
        (of(S.RUNNING, **FORCE), None, NEW, S.STOPPING),
        (of(S.RUNNING), Observed(alive=True, orphaned=True), NEW, Signal.KILL),
        (of(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, S.COMPLETED),
        (of(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.STOPPED), NEW, S.STOPPED),
        (of(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, None),
        (of(S.RUNNING, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), OLD, Signal.KILL),
        (of(S.RUNNING, **FORCE, **FINETUNE), Observed(alive=True, ended=S.COMPLETED), NEW, Signal.KILL),
        (of(S.STOPPING, desired=STOPPED), LIVES, NEW, Signal.STOP),
        (of(S.STOPPING, desired=STOPPED), LIVES, Watch(S.STOPPING, is_stop_sent=True), None),
        (of(S.STOPPING, **FORCE), LIVES, NEW, Signal.KILL),
        (of(S.STOPPING, **FORCE), None, NEW, Signal.KILL),
        (of(S.STOPPING, desired=STOPPED), GONE, NEW, S.STOPPED),
        (of(S.STOPPING, desired=STOPPED), LIVES, OLD, Signal.KILL),
        (of(S.STOPPING, desired=STOPPED, **FINETUNE), LIVES, Watch(S.STOPPING, 0, 3600, is_stop_sent=True), None),
        (of(S.STOPPING, **FORCE), GONE, NEW, S.STOPPED),
        (of(S.STOPPING, **FORCE, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, S.COMPLETED),
        (of(S.STOPPING, desired=STOPPED, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), NEW, S.COMPLETED),
        (of(S.RUNNING, **IDLE_STOP), READY, Watch(S.RUNNING, idle_seconds=59), None),
        (of(S.RUNNING, **IDLE_STOP), READY, Watch(S.RUNNING, idle_seconds=60), PAUSED),
        (of(S.RUNNING, desired=STOPPED, **IDLE_STOP), READY, Watch(S.RUNNING, idle_seconds=60), S.STOPPING),
        (of(S.RUNNING, desired=PAUSED, **IDLE_STOP), READY, OLD, S.STOPPING),
        (of(S.RUNNING, desired=PAUSED, last_request_at=NOW, **IDLE_STOP), READY, OLD, DesiredState.RUNNING),
        (of(S.RUNNING, desired=PAUSED, **IDLE_STOP), GONE, NEW, S.PAUSED),
        (of(S.STOPPING, desired=PAUSED, **IDLE_STOP), LIVES, NEW, Signal.STOP),
        (of(S.STOPPING, desired=PAUSED, **IDLE_STOP), LIVES, OLD, Signal.KILL),
        (of(S.STOPPING, desired=PAUSED, **IDLE_STOP), GONE, NEW, S.PAUSED),
        (of(S.STOPPING, desired=PAUSED, last_request_at=NOW, **IDLE_STOP), LIVES, NEW, DesiredState.RUNNING),
        # A request came after the stop signal.
        (of(S.STOPPING, **IDLE_STOP), LIVES, Watch(S.STOPPING, is_stop_sent=True), None),
        (of(S.STOPPING, **IDLE_STOP), GONE, NEW, S.PAUSED),
        (of(S.PAUSED, desired=PAUSED), None, NEW, None),
        (of(S.PAUSED, desired=PAUSED, last_request_at=NOW), None, NEW, DesiredState.RUNNING),
        (of(S.PAUSED), None, NEW, S.QUEUED),
        (of(S.PAUSED, desired=STOPPED), None, NEW, S.STOPPED),
        (record(S.RUNNING), None, NEW, S.FAILED),  # it has no server
    ],
)
def test_the_next_action_follows_from_what_is_desired_and_what_is_observed(
    engine: EngineRecord, observed: Observed | None, watch: Watch, expected: object
) -> None:
    assert outline(planned(engine, observed, watch)) == expected


@pytest.mark.parametrize(
    ("validation", "desired", "expected"),
    [
        (None, DesiredState.RUNNING, Validate),
        (Validation(is_done=False), DesiredState.RUNNING, None),
        (Validation(is_done=True), DesiredState.RUNNING, S.QUEUED),
        (Validation(is_done=True, reason=DEAD), DesiredState.RUNNING, S.FAILED),
        (Validation(is_done=False), STOPPED, S.STOPPED),
    ],
)
def test_an_engine_is_queued_after_its_validation_and_a_stop_does_not_wait_for_the_validation(
    validation: Validation | None, desired: DesiredState, expected: object
) -> None:
    validations = {"engine-a": validation} if validation else {}
    action = planned(record(S.VALIDATING, desired), None, validations=validations)
    assert outline(action) == expected
    if isinstance(action, Transition) and action.state is S.FAILED:
        assert action.reason == DEAD


def test_a_planned_server_without_a_recorded_launch_is_launched_whatever_was_observed() -> None:
    for observed in (None, LIVES, GONE):
        assert outline(planned(of(S.STARTING), observed, server_state=ServerState.PLANNED)) is Launch
    assert outline(planned(of(S.STARTING, desired=STOPPED), GONE, server_state=ServerState.PLANNED)) == S.FAILED


@pytest.mark.parametrize(
    ("policy", "watch", "restarts", "observed", "expected"),
    [
        (RestartPolicy.NO, Watch(S.RUNNING, seen_alive=True), 0, GONE, None),
        (RestartPolicy.ON_FAILURE, Watch(S.RUNNING, seen_alive=True), 0, GONE, 1),
        (RestartPolicy.ON_FAILURE, Watch(S.RUNNING), 0, GONE, None),  # it was dead when the gateway started
        (RestartPolicy.UNLESS_STOPPED, Watch(S.RUNNING), 0, GONE, 1),
        (RestartPolicy.UNLESS_STOPPED, Watch(S.RUNNING), 4, GONE, 5),
        (RestartPolicy.UNLESS_STOPPED, Watch(S.RUNNING), 5, GONE, None),
        (RestartPolicy.UNLESS_STOPPED, Watch(S.RUNNING, state_seconds=601), 5, GONE, 1),
        (RestartPolicy.UNLESS_STOPPED, Watch(S.RUNNING), 0, Observed(False, ended=S.FAILED, reason=DEAD), None),
    ],
)
def test_a_failed_engine_is_restarted_by_its_policy_unless_its_run_reported_the_failure(
    policy: RestartPolicy, watch: Watch, restarts: int, observed: Observed, expected: int | None
) -> None:
    action = planned(of(S.RUNNING, restart_policy=policy, restarts=restarts), observed, watch)
    assert isinstance(action, Transition)
    assert (action.state, action.restarts) == (S.FAILED, expected)


def test_a_worker_that_exited_without_a_report_is_restarted_unless_a_stop_was_requested() -> None:
    exited = Observed(alive=False, ended=S.FAILED, reason=Reason(code="worker_died", message="dead"))
    engine = of(S.RUNNING, restart_policy=RestartPolicy.ON_FAILURE, **FINETUNE)
    watch = Watch(S.RUNNING, seen_alive=True)
    action = planned(engine, exited, watch)
    assert isinstance(action, Transition)
    assert action.restarts == 1
    action = planned(dataclasses.replace(engine, state=S.STOPPING, desired=STOPPED), exited, watch)
    assert isinstance(action, Transition)
    assert action.restarts is None


@pytest.mark.parametrize(
    ("last_crash", "crash", "expected"),
    [(None, "step 9", 1), ("step 5", "step 9", 1), ("step 9", "loading at step 9", 1), ("step 9", "step 9", None)],
)
def test_a_run_that_crashes_again_at_the_same_point_is_not_restarted(
    last_crash: str | None, crash: str, expected: int | None
) -> None:
    exited = Observed(alive=False, ended=S.FAILED, reason=Reason(code="worker_died", message="Dead."), crash=crash)
    engine = of(S.RUNNING, restart_policy=RestartPolicy.UNLESS_STOPPED, last_crash=last_crash, **FINETUNE)
    action = planned(engine, exited)
    assert isinstance(action, Transition)
    assert (action.restarts, action.values) == (expected, {"last_crash": crash})
    assert action.reason
    assert ("exited at the same point before" in action.reason.message) == (expected is None)


def test_an_engine_is_restarted_as_often_as_the_user_allows() -> None:
    for max_restarts, expected in ((0, None), (2, None), (3, 3)):
        engine = of(S.RUNNING, restart_policy=RestartPolicy.UNLESS_STOPPED, restarts=2, max_restarts=max_restarts)
        action = planned(engine, GONE)
        assert isinstance(action, Transition)
        assert action.restarts == expected


def test_a_hung_server_is_killed_and_restarted_only_if_its_policy_says_so() -> None:
    hung = Watch(S.RUNNING, silent_seconds=61, seen_alive=True)
    engine = of(S.RUNNING, restart_policy=RestartPolicy.ON_FAILURE)
    assert outline(planned(of(S.RUNNING), LIVES, hung)) is None
    assert outline(planned(engine, LIVES, hung)) is Signal.KILL
    action = planned(engine, GONE, hung)
    assert isinstance(action, Transition)
    assert action.reason is not None
    assert (action.state, action.reason.code, action.restarts) == (S.FAILED, "engine_unresponsive", 1)


def test_an_engine_that_never_answers_fails_only_after_its_process_is_dead() -> None:
    assert outline(planned(of(S.STARTING), LIVES, OLD)) is Signal.KILL
    action = planned(of(S.STARTING), GONE, OLD)
    assert isinstance(action, Transition)
    assert action.reason is not None
    assert (action.state, action.reason.code) == (S.FAILED, "start_timeout")


def test_a_run_that_was_killed_on_request_fails_with_the_reason_killed() -> None:
    died = Reason(code="worker_died", message="dead", hint="`resume` continues from checkpoint 5.")
    action = planned(of(S.STOPPING, **FORCE, **FINETUNE), Observed(alive=False, ended=S.FAILED, reason=died))
    assert isinstance(action, Transition)
    assert action.reason is not None
    assert (action.state, action.reason.code, action.reason.hint) == (S.FAILED, "killed", died.hint)


def test_a_run_that_has_stopped_becomes_paused_if_a_pause_was_requested() -> None:
    for state in (S.STARTING, S.RUNNING, S.STOPPING):
        action = planned(of(state, desired=DesiredState.PAUSED, **FINETUNE), Observed(alive=False, ended=S.STOPPED))
        assert isinstance(action, Transition)
        assert action.state is S.PAUSED
        check_transition(state, action.state)


@given(
    state=st.sampled_from([s for s in EngineState if s not in SETTLED]),
    desired=st.sampled_from(DesiredState),
    force=st.booleans(),
    kind=st.sampled_from(EngineKind),
    policy=st.sampled_from(RestartPolicy),
    observed=st.none()
    | st.builds(
        Observed,
        alive=st.booleans(),
        ready=st.booleans(),
        ended=st.sampled_from([None, *SETTLED]),
        orphaned=st.booleans(),
        reason=st.none(),
        process=st.none(),
        training=st.none(),
    ),
    watch=st.sampled_from([NEW, OLD, Watch(S.RUNNING, silent_seconds=99)]),
    server_state=st.sampled_from(ServerState),
)
def test_no_plan_has_an_illegal_transition_or_ends_an_engine_whose_process_may_exist(
    state: EngineState,
    desired: DesiredState,
    force: bool,
    kind: EngineKind,
    policy: RestartPolicy,
    observed: Observed | None,
    watch: Watch,
    server_state: ServerState,
) -> None:
    engine = of(state, desired=desired, force=force, kind=kind, restart_policy=policy)
    action = planned(engine, observed, watch, server_state=server_state)
    if isinstance(action, Transition):
        check_transition(state, action.state)
        if state not in (S.VALIDATING, S.QUEUED, S.PAUSED) and (observed is None or observed.alive or observed.orphaned):
            assert action.state not in SETTLED


def test_the_cost_of_a_plan_grows_linearly_with_the_number_of_engines() -> None:
    def calls(count: int) -> int:
        engines = [of(random.Random(i).choice([S.RUNNING, S.STARTING]), id=f"engine-{i}") for i in range(count)]
        seen, watches = dict.fromkeys((e.id for e in engines), LIVES), dict.fromkeys((e.id for e in engines), NEW)
        snapshot = Snapshot(engines, {"server-a": server()}, seen, watches, {}, LIMITS)
        counted = itertools.count()
        sys.setprofile(lambda *_: next(counted))
        try:
            plan(snapshot)
        finally:
            sys.setprofile(None)
        return next(counted)

    assert calls(8000) < 8.1 * calls(1000)  # with a quadratic cost, the factor would be 64
