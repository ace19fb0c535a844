"""Which server an engine joins, and what happens to the server's other engines if one engine leaves."""

from typing import Any

import pytest
from engines import record, server

from sage.llm.client.types import DesiredState, EngineState, Reason, RestartPolicy
from sage.llm.control_plane.actions import Action, Join, Launch, LoadAdapter, Revise, SendSignal, Transition, UnloadAdapter
from sage.llm.control_plane.backends.transformers import TransformersOptions
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.launchers.base import Signal
from sage.llm.control_plane.plan import Limits, Snapshot, plan
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord, ServerState
from sage.llm.control_plane.watch import Watch

S = EngineState
LIMITS = Limits(start_seconds=300, stop_seconds=20, unresponsive_seconds=30)
NEW, OLD = Watch(S.RUNNING, seen_alive=True), Watch(S.RUNNING, state_seconds=3600, served_seconds=3600, seen_alive=True)
STOPPED: dict[str, Any] = {"desired": DesiredState.STOPPED}
FORCE: dict[str, Any] = {**STOPPED, "force": True}
DEAD = Observed(alive=False, reason=Reason(code="engine_died", message="dead"))
LIVES = Observed(alive=True)
AT_BASE = {"state": S.RUNNING, "server_id": "server-base", "served_as": "sage-base-1"}


def ready(*models: str) -> Observed:
    return Observed(alive=True, ready=True, models=frozenset({"sage-base-1", *models}))


def base(**values: Any) -> EngineRecord:
    return record(**{"id": "engine-base", "base": "/base", "revision": 1, **values})


def adapter(name: str, **values: Any) -> EngineRecord:
    return record(**{"id": f"engine-{name}", "base": "/base", "adapter": f"/{name}", "revision": 1, **values})


def hosted(name: str, state: EngineState = S.RUNNING, **values: Any) -> EngineRecord:
    served_as = None if state is S.STARTING else f"sage-{name}-1"
    return adapter(name, **{"state": state, "server_id": "server-base", "served_as": served_as, **values})


def shared(state: ServerState = ServerState.LAUNCHED, **values: Any) -> ServerRecord:
    fields = {"id": "server-base", "model": "/base", "options": {}, "served_name": "sage-base-1", "shared": True}
    return server(state, **{**fields, **values})


def planned(
    engines: list[EngineRecord],
    observed: Observed | dict[str, Observed] | None = None,
    watch: Watch = NEW,
    servers: list[ServerRecord] | None = None,
) -> dict[str, Action]:
    """Return the planned action of each engine, with the suffix of the engine's id as the key.

    observed: for each engine id, or a single observation for all engines that have a server and are not queued.
    """
    servers = [shared()] if servers is None else servers
    if not isinstance(observed, dict):
        with_server = [engine.id for engine in engines if engine.server_id and engine.state is not S.QUEUED]
        observed = dict.fromkeys(with_server, observed) if observed else {}
    watches = {engine.id: watch for engine in engines}
    snapshot = Snapshot(engines, {host.id: host for host in servers}, observed, watches, {}, LIMITS)
    return {action.engine.id.removeprefix("engine-"): action for action in plan(snapshot)}


def outline(action: Action | None) -> object:
    match action:
        case Transition(state=state):
            return state
        case SendSignal(signal=signal):
            return signal
        case _:
            return type(action)


def test_an_adapter_joins_the_server_that_has_its_base() -> None:
    actions = planned([base(**AT_BASE), adapter("x")], {"engine-base": ready()})
    assert actions == {"x": Join(adapter("x"), shared())} | {"x": actions["x"]}
    assert isinstance(actions["x"], Join)


@pytest.mark.parametrize(
    "engine",
    [
        adapter("x", base="/other"),
        adapter("x", base_version="replaced"),
        adapter("x", options={"dtype": "bf16"}),
        adapter("x", backend="other"),
        adapter("x", base=None, adapter=None),  # dedicated, or an adapter that a running base cannot load
        adapter("x", requested_port=9001),
        base(id="engine-x"),  # the server already has an engine for its base
    ],
)
def test_an_engine_that_fits_no_server_gets_its_own(engine: EngineRecord) -> None:
    actions = planned([base(**AT_BASE), engine], {"engine-base": ready()})
    assert outline(actions["x"]) is Launch


def test_an_engine_with_a_port_joins_the_shared_server_that_listens_on_it() -> None:
    resumed = base(requested_port=9000, server_id="server-base")
    assert (
        outline(planned([hosted("y"), resumed], ready("sage-y-1"), servers=[shared(address="127.0.0.1:9000")])["base"])
        is Join
    )
    other = shared(address="127.0.0.1:9001")
    assert outline(planned([hosted("y"), resumed], ready("sage-y-1"), servers=[other])["base"]) is Launch


def test_an_engine_with_a_port_waits_until_the_server_that_listens_on_it_has_ended() -> None:
    closing = shared(ServerState.CLOSING, address="127.0.0.1:9000")
    leaving = hosted("y", S.STOPPING, **STOPPED)
    for engine in (base(requested_port=9000), base(requested_port=9000, base=None)):
        assert "base" not in planned([leaving, engine], ready("sage-y-1"), servers=[closing])
    assert outline(planned([leaving, base(requested_port=9001)], ready("sage-y-1"), servers=[closing])["base"]) is Launch


def test_if_several_engines_wait_for_a_server_the_engine_with_a_port_launches_the_server() -> None:
    waiting = [hosted("y", S.STARTING), hosted("x", S.STARTING, requested_port=9000)]
    actions = planned(waiting, servers=[shared(ServerState.PLANNED, address=None)])
    assert {name: outline(action) for name, action in actions.items()} == {"x": Launch}


def test_an_engine_joins_a_server_whose_stored_options_lack_an_option_of_a_newer_version() -> None:
    complete = TransformersOptions().model_dump()
    older = {name: value for name, value in complete.items() if name != "threads"}
    assert older != complete
    actions = planned(
        [base(**AT_BASE), adapter("x", options=complete)], {"engine-base": ready()}, servers=[shared(options=older)]
    )
    assert outline(actions["x"]) is Join


def test_a_server_that_is_full_closing_or_gone_is_not_joined() -> None:
    running, queued = hosted("y"), adapter("x")
    for host in (shared(max_adapters=1), shared(ServerState.CLOSING)):
        assert outline(planned([running, queued], ready("sage-y-1"), servers=[host])["x"]) is Launch
    actions = planned([running, queued, adapter("z")], ready("sage-y-1"), servers=[shared(max_adapters=2)])
    assert (outline(actions["x"]), outline(actions["z"])) == (Join, Launch)
    actions = planned([running, queued], {running.id: DEAD})
    # The engine waits until the other engine has left the dead server and has launched another server.
    assert "x" not in actions


def test_a_server_whose_memory_is_promised_to_another_engine_is_not_joined() -> None:
    paused = {"desired": DesiredState.PAUSED, "paused_by": "engine-large"}
    leaving, staying = base(**AT_BASE, **paused), hosted("y")
    assert outline(planned([leaving, adapter("x")], ready())["x"]) is Launch
    assert outline(planned([leaving, staying, adapter("x")], ready("sage-y-1"))["x"]) is Join


def test_an_engine_for_the_base_joins_a_server_that_was_started_for_an_adapter() -> None:
    actions = planned([hosted("y"), base(state=S.QUEUED)], ready("sage-y-1"))
    assert outline(actions["base"]) is Join
    actions = planned([hosted("y"), base(state=S.STARTING, server_id="server-base", served_as=None)], ready("sage-y-1"))
    assert actions["base"] == Transition(actions["base"].engine, S.RUNNING, values={"served_as": "sage-base-1"})


def test_if_engines_with_the_same_base_start_together_one_launches_the_server_and_the_others_join() -> None:
    waiting = [adapter(name) for name in "abc"]
    actions = planned(waiting, servers=[])
    assert {name: outline(action) for name, action in actions.items()} == {"a": Launch}
    launching = [hosted("a", S.STARTING), adapter("b"), adapter("c")]
    actions = planned(launching, servers=[shared(ServerState.PLANNED)])
    assert {name: outline(action) for name, action in actions.items()} == {"a": Launch, "b": Join, "c": Join}
    joined = [hosted(name, S.STARTING) for name in "abc"]
    actions = planned(joined, servers=[shared(ServerState.PLANNED)])
    assert {name: outline(action) for name, action in actions.items()} == {"a": Launch}


def test_an_engine_whose_last_server_is_in_use_gets_another_server() -> None:
    moved = adapter("x", server_id="server-base", base="/other")
    action = planned([hosted("y"), moved], ready("sage-y-1"))["x"]
    assert action == Launch(moved, None, is_moved=True)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (LIVES, None),
        (ready("sage-y-1"), LoadAdapter),
        (ready("sage-y-1", "sage-x-1"), S.RUNNING),
        (DEAD, S.FAILED),
        (None, None),
    ],
)
def test_an_engine_runs_once_its_adapter_is_loaded(observed: Observed | None, expected: object) -> None:
    starting = hosted("x", S.STARTING)
    action = planned([hosted("y"), starting], {starting.id: observed} if observed else {}).get("x")
    assert (outline(action) if action else None) == expected
    if isinstance(action, Transition) and action.state is S.RUNNING:
        assert action.values == {"served_as": "sage-x-1"}


def test_an_adapter_that_is_not_loaded_in_time_fails_and_the_other_engines_continue() -> None:
    actions = planned([hosted("y"), hosted("x", S.STARTING)], ready("sage-y-1"), OLD)
    failed = actions["x"]
    assert isinstance(failed, Transition)
    assert failed.reason
    assert (failed.state, failed.must_remain, failed.reason.code) == (S.FAILED, True, "start_timeout")
    assert "killed" not in failed.reason.message
    alone = planned([hosted("x", S.STARTING)], ready(), OLD)["x"]
    assert isinstance(alone, SendSignal)
    assert (alone.signal, alone.closes) == (Signal.KILL, True)


def test_a_late_start_kills_a_server_of_several_engines_only_if_the_server_does_not_answer() -> None:
    late, other = hosted("x", S.STARTING), hosted("y", S.STARTING, restarts=1)
    assert outline(planned([late, other], ready(), OLD)["x"]) is S.FAILED
    assert outline(planned([late, other], LIVES, OLD)["x"]) is Signal.KILL
    after = planned([late, other], DEAD)["y"]
    assert isinstance(after, Transition)
    assert after.restarts == 2  # the other engine gets another server


def test_an_adapter_that_its_server_refused_gets_a_server_of_its_own() -> None:
    refused = hosted("x", S.STARTING, base=None, adapter=None, form="merged, because it is odd", restarts=2)
    action = planned([hosted("y"), refused], ready("sage-y-1"))["x"]
    assert isinstance(action, Transition)
    assert (action.state, action.restarts, action.must_remain) == (S.FAILED, 2, True)
    assert outline(planned([refused], ready())["x"]) is Signal.KILL
    action = planned([refused], DEAD)["x"]
    assert isinstance(action, Transition)
    assert (action.restarts, action.must_remain) == (2, False)


@pytest.mark.parametrize(
    ("engine", "observed", "watch", "expected"),
    [
        (hosted("x", **STOPPED), ready("sage-x-1"), NEW, S.STOPPING),
        (hosted("x", S.STOPPING, **STOPPED), ready("sage-x-1"), NEW, UnloadAdapter),
        (hosted("x", S.STOPPING, **STOPPED), ready(), NEW, S.STOPPED),
        (hosted("x", S.STOPPING, **STOPPED), ready("sage-x-1"), OLD, S.STOPPED),
        (hosted("x", S.STOPPING, **STOPPED), LIVES, NEW, S.STOPPED),
        (hosted("x", S.STOPPING, **STOPPED), None, NEW, None),
        (hosted("x", **FORCE), ready("sage-x-1"), NEW, S.STOPPING),
        (hosted("x", S.STOPPING, **FORCE), ready("sage-x-1"), NEW, S.STOPPED),
        (hosted("x", S.STOPPING, **FORCE), None, NEW, S.STOPPED),
        (hosted("x", S.STOPPING, **STOPPED), DEAD, NEW, S.STOPPED),
        (base(**{**AT_BASE, "state": S.STOPPING}, **STOPPED), ready(), NEW, S.STOPPED),
    ],
)
def test_an_engine_that_stops_does_not_end_the_process_of_the_other_engines(
    engine: EngineRecord, observed: Observed | None, watch: Watch, expected: object
) -> None:
    name = engine.id.removeprefix("engine-")
    action = planned([hosted("y"), engine], {engine.id: observed} if observed else {}, watch).get(name)
    assert (outline(action) if action else None) == expected
    if isinstance(action, Transition) and action.state is S.STOPPED:
        assert action.must_remain == (observed is not DEAD)


@pytest.mark.parametrize("name", ["x", "base"])
def test_the_last_engine_of_a_server_ends_the_process(name: str) -> None:
    last = hosted(name, S.STOPPING, **STOPPED) if name == "x" else base(**{**AT_BASE, "state": S.STOPPING}, **STOPPED)
    others = [hosted("y", S.QUEUED), hosted("z", S.STOPPED)]  # engines that have left the server
    action = planned([last, *others], {last.id: ready("sage-x-1")})[name]
    assert action == SendSignal(last, shared(created_at=action.server.created_at), Signal.STOP, closes=True)  # type: ignore[union-attr]


def test_every_engine_of_a_server_that_died_restarts_by_its_own_policy() -> None:
    policy = RestartPolicy.ON_FAILURE
    engines = [hosted("x", restart_policy=policy), hosted("y"), hosted("z", restart_policy=policy, restarts=5)]
    actions = planned(engines, DEAD)
    failures = {name: action.restarts for name, action in actions.items() if isinstance(action, Transition)}
    assert failures == {"x": 1, "y": None, "z": None}


@pytest.mark.parametrize(("engine", "restarts"), [("base", None), ("x", 1), ("late", None), ("stopped", None)])
def test_an_engine_that_joined_a_server_which_died_gets_another_server_at_most_five_times(
    engine: str, restarts: int | None
) -> None:
    starting = [base(state=S.STARTING, server_id="server-base"), hosted("x", S.STARTING)]
    starting += [hosted("late", S.STARTING, restarts=5), hosted("stopped", S.STARTING, **STOPPED)]
    action = planned(starting, DEAD)[engine]
    assert isinstance(action, Transition)
    assert (action.state, action.restarts, action.must_remain) == (S.FAILED, restarts, False)


def test_a_newer_version_of_an_adapter_answers_once_it_is_loaded_and_the_older_one_is_unloaded_later() -> None:
    newer = hosted("x", revision=2)
    assert outline(planned([newer], ready("sage-x-1"))["x"]) is LoadAdapter
    assert planned([newer], ready("sage-x-1", "sage-x-2"))["x"] == Revise(newer)
    served = hosted("x", revision=2, served_as="sage-x-2")
    assert planned([served], ready("sage-x-1", "sage-x-2"), NEW) == {}  # requests may still name the older version
    action = planned([served], ready("sage-x-1", "sage-x-2"), OLD)["x"]
    assert isinstance(action, UnloadAdapter)
    assert action.name == "sage-x-1"


def test_a_newer_version_that_was_refused_is_not_loaded_again_while_the_older_one_answers() -> None:
    refused = hosted("x", revision=2, reason=Reason(code="adapter_refused", message="its rank is too large"))
    assert planned([refused], ready("sage-x-1")) == {}
    assert outline(planned([refused], ready(), OLD)["x"]) is LoadAdapter


def test_an_adapter_of_an_engine_that_has_left_is_unloaded_by_another_engine_of_the_server() -> None:
    actions = planned([hosted("x"), hosted("y")], ready("sage-x-1", "sage-y-1", "sage-gone-3", "not-ours"))
    assert {name: getattr(action, "name", None) for name, action in actions.items()} == {"x": "sage-gone-3"}


def test_an_adapter_that_a_server_has_lost_is_loaded_again_unless_it_was_loaded_after_the_observation() -> None:
    engines = [hosted("x"), hosted("y")]
    assert outline(planned(engines, ready("sage-y-1"), OLD)["x"]) is LoadAdapter
    assert "x" not in planned(engines, ready("sage-y-1"), NEW)
