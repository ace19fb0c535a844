import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.common.errors import ConfigError, NotFound, SageError
from sage.common.processes import ProcessIdentity
from sage.llm.control_plane import SUPPORTED_ENGINE_KINDS
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.reconciler import Action, Effect, Limits, Reconciler, decide
from sage.llm.control_plane.states import SETTLED, TRANSITIONS, EngineState, IllegalTransition, check_transition
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import EngineRecord, StaleWrite, Store
from sage.llm.control_plane.types import EngineKind, Reason, Wanted

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20)
DEAD = Reason(code="engine_died", message="dead")


def record(state: EngineState = S.QUEUED, wanted: Wanted = Wanted.RUNNING, **values: Any) -> EngineRecord:
    now = datetime.now(UTC)
    given_values = {"id": "engine-a", "kind": EngineKind.LLM, "state_at": now, **values}
    return EngineRecord(
        model="m", name="m", options={}, wanted=wanted, state=state, reason=None, node="n", port=None,
        requested_port=None, version=1, created_at=now, **given_values,
    )  # fmt: skip


def test_the_kinds_are_the_requirement_s() -> None:
    assert SUPPORTED_ENGINE_KINDS == ["llm", "embedding", "finetune"]


def test_every_state_has_its_row_and_only_settled_ones_may_end_there() -> None:
    assert set(TRANSITIONS) == set(EngineState)
    for state, after in TRANSITIONS.items():
        assert after or state is S.COMPLETED
    with pytest.raises(IllegalTransition):
        check_transition(S.COMPLETED, S.RUNNING)


LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
FINETUNE = {"kind": EngineKind.FINETUNE}


@pytest.mark.parametrize(
    ("engine", "observed", "action"),
    [
        (record(), Observed(alive=False), Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=True), Action(Effect.LAUNCH, S.STARTING)),
        (record(), Observed(alive=False, ended=S.STOPPED), Action(Effect.LAUNCH, S.STARTING)),
        (record(wanted=Wanted.STOPPED), Observed(alive=False), Action(state=S.STOPPED)),
        (record(wanted=Wanted.STOPPED), Observed(alive=True), Action(Effect.LAUNCH, S.STARTING)),
        (record(S.STARTING), Observed(alive=True), Action()),
        (record(S.STARTING), Observed(alive=True, ready=True), Action(state=S.RUNNING)),
        (record(S.STARTING), Observed(alive=False, reason=DEAD), Action(state=S.FAILED, reason=DEAD)),
        (record(S.STARTING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), Action(state=S.RUNNING)),
        (record(S.STARTING, Wanted.STOPPED), Observed(alive=True), Action(Effect.STOP, S.STOPPING)),
        (record(S.RUNNING), Observed(alive=True, ready=True), Action()),
        (record(S.RUNNING), Observed(alive=False, reason=DEAD), Action(state=S.FAILED, reason=DEAD)),
        (record(S.RUNNING, Wanted.STOPPED), Observed(alive=True, ready=True), Action(Effect.STOP, S.STOPPING)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.COMPLETED), Action(state=S.COMPLETED)),
        (record(S.RUNNING, **FINETUNE), Observed(alive=False, ended=S.STOPPED), Action(state=S.STOPPED)),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=True), Action()),
        (record(S.STOPPING, Wanted.STOPPED), Observed(alive=False), Action(state=S.STOPPED)),
        (record(S.STOPPING, Wanted.STOPPED, state_at=LONG_AGO), Observed(alive=True), Action(Effect.KILL)),
        (record(S.STOPPING, Wanted.STOPPED, state_at=LONG_AGO, **FINETUNE), Observed(alive=True), Action()),
        (
            record(S.STOPPING, Wanted.STOPPED, **FINETUNE),
            Observed(alive=False, ended=S.COMPLETED),
            Action(state=S.COMPLETED),
        ),
    ],
)
def test_the_next_action_follows_from_what_is_wanted_and_what_is(
    engine: EngineRecord, observed: Observed, action: Action
) -> None:
    assert decide(engine, observed, LIMITS) == action


def test_an_engine_that_never_answers_is_killed_and_says_so() -> None:
    action = decide(record(S.STARTING, state_at=LONG_AGO), Observed(alive=True), LIMITS)
    assert (action.effect, action.state) == (Effect.KILL, S.FAILED)
    assert action.reason is not None
    assert action.reason.code == "start_timeout"


@given(
    state=st.sampled_from([s for s in EngineState if s not in SETTLED]),
    wanted=st.sampled_from(Wanted),
    kind=st.sampled_from(EngineKind),
    alive=st.booleans(),
    ready=st.booleans(),
    ended=st.sampled_from([None, *SETTLED]),
    is_old=st.booleans(),
)
def test_no_decision_is_ever_an_illegal_step(
    state: EngineState, wanted: Wanted, kind: EngineKind, alive: bool, ready: bool, ended: EngineState | None, is_old: bool
) -> None:
    engine = record(state, wanted, kind=kind, state_at=LONG_AGO if is_old else datetime.now(UTC))
    action = decide(engine, Observed(alive=alive, ready=ready, ended=ended), LIMITS)
    if action.state is not None:
        check_transition(state, action.state)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_database(f"sqlite:///{tmp_path}/state/engines.db"))


def test_every_transition_is_kept_with_its_reason_and_actor(store: Store) -> None:
    store.add(record(), "user")
    engine = store.move(store.get("engine-a"), S.STARTING, "reconciler", port=9)
    engine = store.move(engine, S.FAILED, "reconciler", DEAD)
    assert (engine.state, engine.reason, engine.port) == (S.FAILED, DEAD, 9)
    assert [(e.before, e.after, e.actor, e.reason) for e in store.events("engine-a")] == [
        (None, S.QUEUED, "user", ""), (S.QUEUED, S.STARTING, "reconciler", ""), (S.STARTING, S.FAILED, "reconciler", "dead"),
    ]  # fmt: skip
    assert store.list(active_only=True) == []


def test_a_stale_worker_changes_nothing(store: Store) -> None:
    store.add(record(), "user")
    stale = store.get("engine-a")
    store.want(stale, Wanted.STOPPED)
    with pytest.raises(StaleWrite):
        store.move(stale, S.STARTING, "reconciler")
    assert store.get("engine-a").state is S.QUEUED
    assert len(store.events("engine-a")) == 1


def test_an_engine_is_removed_with_its_events(store: Store) -> None:
    store.add(record(S.STOPPED), "user")
    store.remove(store.get("engine-a"))
    with pytest.raises(NotFound, match="No engine 'engine-a'"):
        store.get("engine-a")
    assert store.events("engine-a") == []


def test_one_control_plane_reconciles_and_a_dead_one_is_not_waited_for(store: Store) -> None:
    me = ProcessIdentity.of(1)
    assert store.hold_lease("a", "n", me)
    assert store.hold_lease("a", "n", me)
    assert not store.hold_lease("b", "n", me)
    assert not store.hold_lease("b", "other node", me)
    assert store.hold_lease("c", "n", ProcessIdentity(1, start_time=5.0)) is False
    store.release_lease("a")
    assert store.hold_lease("dead", "n", ProcessIdentity(1, start_time=5.0))
    assert store.hold_lease("b", "n", me)


def test_opening_the_database_again_keeps_what_it_holds(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/engines.db"
    Store(open_database(url)).add(record(), "user")
    assert Store(open_database(url)).get("engine-a").model == "m"


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////proc/none/engines.db", "nosuch://x"])
def test_a_database_that_cannot_be_opened_is_one_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_database(url)


class Executor:
    """Stands in for processes in the tests of the loop itself; fails as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.launched = error, 0

    async def observe(self, engine: EngineRecord) -> Observed:
        return Observed(alive=False)

    async def launch(self, engine: EngineRecord) -> int | None:
        self.launched += 1
        if self.error:
            raise self.error
        return 77


@pytest.mark.parametrize("error", [SageError(code="c", message="no model"), OSError("no space")])
def test_an_engine_that_cannot_be_launched_fails_with_the_reason_and_the_others_go_on(
    store: Store, error: Exception
) -> None:
    store.add(record(), "user")
    store.add(dataclasses.replace(record(), id="engine-b", kind=EngineKind.EMBEDDING), "user")
    executors: Any = {EngineKind.LLM: Executor(error), EngineKind.EMBEDDING: Executor()}
    asyncio.run(Reconciler(store, executors, LIMITS).tick())
    assert store.get("engine-a").state is S.FAILED
    assert str(error) in (store.get("engine-a").reason or DEAD).message
    assert (store.get("engine-b").state, store.get("engine-b").port) == (S.STARTING, 77)


def test_an_unforeseen_error_leaves_the_engine_for_the_next_tick(store: Store) -> None:
    store.add(record(), "user")
    executors: Any = {EngineKind.LLM: Executor(ZeroDivisionError())}
    asyncio.run(Reconciler(store, executors, LIMITS).tick())
    assert store.get("engine-a").state is S.QUEUED
