"""The routing table finds the engine that serves a request."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from store_promises import lease_of

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import DEFAULT_MODEL, DesiredState, EngineKind, EngineState, RouteTarget
from sage.llm.control_plane.routing import Route, RoutingTable
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.routes import RouteRecord
from sage.llm.control_plane.store.store import Store

S, K = EngineState, EngineKind


def table_of(*states: tuple[str, EngineState], **values: Any) -> RoutingTable:
    table = RoutingTable("n")
    for number, (name, state) in enumerate(states):
        table.apply(record(state, id=name, first_event=number, last_event=number, **values), None)
    return table


def find(table: RoutingTable, model: str, unresponsive: str = "") -> Route:
    return table.find(model, K.LLM, lambda engine_id: engine_id != unresponsive)


@pytest.mark.parametrize(
    ("states", "unresponsive", "found"),
    [
        ([("old", S.RUNNING), ("new", S.QUEUED)], "", "old"),
        ([("old", S.RUNNING), ("new", S.VALIDATING)], "", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "", "old"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "", "new"),
        ([("old", S.RUNNING), ("new", S.STOPPING)], "", "old"),
        ([("old", S.RUNNING), ("new", S.FAILED)], "", "old"),
        ([("old", S.STARTING), ("new", S.QUEUED)], "", "new"),
        ([("old", S.RUNNING), ("new", S.RUNNING)], "new", "old"),
        ([("old", S.RUNNING), ("new", S.STARTING)], "old", "new"),
    ],
)
@pytest.mark.parametrize("model", ["m", DEFAULT_MODEL])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_newest_responsive_engine_serves_and_the_others_wait(
    states: list[tuple[str, EngineState]], unresponsive: str, found: str, model: str, reverse: bool
) -> None:
    table = RoutingTable("n")
    for number, (name, state) in sorted(enumerate(states), reverse=reverse):  # in both orders, the result is the same
        table.apply(record(state, id=name, first_event=number, last_event=number), None)
    assert find(table, model, unresponsive).engine_id == found


def test_the_default_model_is_the_engine_that_started_last_and_not_the_one_created_last() -> None:
    table = RoutingTable("n")
    table.apply(record(S.RUNNING, id="resumed", first_event=1, last_event=9), None)
    table.apply(record(S.RUNNING, id="new", first_event=2, last_event=8), None)
    assert find(table, DEFAULT_MODEL).engine_id == "resumed"
    assert find(table, "m").engine_id == "new"


def test_an_engine_is_found_by_its_id_its_name_and_its_model() -> None:
    table = table_of(("engine-a", S.RUNNING), name="assistant", model="org/base")
    assert {find(table, model).engine_id for model in ("engine-a", "assistant", "org/base", DEFAULT_MODEL)} == {"engine-a"}
    with pytest.raises(NotFound):
        table.find("assistant", K.EMBEDDING, lambda _: True)


def test_a_request_fails_at_once_if_the_only_running_engine_does_not_respond() -> None:
    with pytest.raises(Overloaded, match="does not respond"):
        find(table_of(("engine-a", S.RUNNING)), "m", unresponsive="engine-a")


def test_the_error_for_an_unknown_model_lists_the_existing_names() -> None:
    with pytest.raises(NotFound, match="serves the model 'x'; available engines: m") as caught:
        find(table_of(("engine-a", S.RUNNING)), "x")
    assert "engine start x" in caught.value.hint
    assert "engine list" in caught.value.hint  # the engine may have failed
    with pytest.raises(NotFound, match="available engines: none") as caught:
        find(table_of(), "x" * 5000)
    assert len(str(caught.value)) < 600
    many = RoutingTable("n")
    for number in range(1000):
        many.apply(record(S.RUNNING, id=f"engine-{number}", name=f"name-{number}", first_event=number), None)
    with pytest.raises(NotFound, match=r"available engines: name-\d+, .*, …\.") as caught:
        find(many, "x")
    assert len(str(caught.value)) < 600


def test_a_route_contains_the_server_s_address_and_its_name_for_the_engine() -> None:
    table = RoutingTable("n")
    table.apply(record(S.RUNNING, served_as="sage-a-1"), server(address="127.0.0.1:9000"))
    route = find(table, "m")
    assert (route.address, route.model_name) == ("127.0.0.1:9000", "sage-a-1")


def test_an_older_version_of_an_engine_is_ignored() -> None:
    table = table_of(("engine-a", S.RUNNING), version=5)
    table.apply(record(S.STARTING, version=4), None)
    assert find(table, "m").state is S.RUNNING


def test_settled_and_removed_engines_and_those_of_other_nodes_are_not_routed() -> None:
    table = table_of(("ended", S.RUNNING), ("removed", S.RUNNING))
    table.apply(record(S.FAILED, id="ended"), None)
    table.forget("removed")
    table.forget("never-known")
    table.apply(record(S.RUNNING, id="elsewhere", node="other"), server(node="other"))
    with pytest.raises(NotFound, match="available engines: none"):
        find(table, "m")
    assert (table.routes(K.LLM), table.get("ended"), table.get("removed")) == ([], None, None)


def test_the_only_engine_can_stop_and_is_no_longer_routed() -> None:
    table = table_of(("engine-a", S.RUNNING))
    for version, state in ((2, S.STOPPING), (3, S.STOPPING), (4, S.STOPPED)):
        table.apply(record(state, version=version), None)
        with pytest.raises(NotFound):
            find(table, "m")
    table.apply(record(S.STOPPING), None)
    table.forget("engine-a")
    assert table.get("engine-a") is None


def test_the_routes_of_a_kind_are_listed_with_running_engines_first() -> None:
    table = table_of(("a", S.RUNNING), ("b", S.STARTING), ("c", S.RUNNING), ("d", S.STOPPING))
    assert [route.engine_id for route in table.routes(K.LLM)] == ["c", "a", "b"]
    assert table.routes(K.EMBEDDING) == []


def test_the_time_of_a_lookup_does_not_grow_with_the_number_of_engines() -> None:
    def seconds(number: int) -> float:
        table = table_of(*((f"engine-{i}", S.RUNNING) for i in range(number)))
        best = float("inf")
        for _ in range(50):
            began = time.perf_counter()
            find(table, "m")
            find(table, DEFAULT_MODEL)
            find(table, "engine-1")
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(5000) < 20 * seconds(5)  # a scan would take 1000 times as long


def test_a_waiter_is_woken_by_a_change_that_happened_before_it_began_to_wait() -> None:
    async def wait() -> None:
        table = RoutingTable("n")
        change = table.next_change()
        table.apply(record(S.STARTING), None)
        await change.wait()
        change = table.next_change()
        assert not change.is_set()
        table.forget("engine-a")
        await change.wait()

    asyncio.run(wait())


def test_writes_of_another_process_reach_the_table_through_the_change_feed(tmp_path: Path) -> None:
    async def follow() -> None:
        store = Store(open_database(f"sqlite:///{tmp_path}/engines.db"))
        lease = lease_of(store)
        engine = store.add(record(), "user", lease)
        ended = store.add(record(S.STOPPED, id="engine-b"), "user", lease)
        table = RoutingTable("n")
        following = asyncio.create_task(table.follow(store, await table.load(store)))
        assert [route.engine_id for route in table.routes(K.LLM)] == ["engine-a"]
        change = table.next_change()
        engine = store.transition(engine, S.STARTING, actor="r", lease=lease, put_server=server(), server_id="server-a")
        store.remove(ended, actor="user", lease=lease)
        await change.wait()
        assert find(table, "m").address == "127.0.0.1:9000"
        change = table.next_change()
        store.transition(engine, S.FAILED, actor="r", lease=lease, leave_server="server-a")
        await change.wait()
        assert table.routes(K.LLM) == []
        following.cancel()

    asyncio.run(follow())


def test_a_database_error_does_not_end_the_reading_of_the_change_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage.llm.control_plane.routing._FOLLOW_SECONDS", 0.01)

    async def follow() -> None:
        database = open_database(f"sqlite:///{tmp_path}/engines.db")
        store = Store(database)
        lease = lease_of(store)
        table = RoutingTable("n")
        with database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE engine_events RENAME TO aside")
        following = asyncio.create_task(table.follow(store, 0))
        await asyncio.sleep(0)
        change = table.next_change()
        with database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE aside RENAME TO engine_events")
        store.add(record(), "user", lease)
        await change.wait()
        following.cancel()

    asyncio.run(follow())


def named(name: str, *engines: str, fallback: str | None = None) -> RouteRecord:
    return RouteRecord(name, tuple(RouteTarget(engine=engine) for engine in engines), fallback, datetime.now(UTC))


def test_a_route_takes_precedence_over_an_engine_of_the_same_name_and_may_lead_to_that_engine() -> None:
    table = RoutingTable("n")
    table.apply(record(S.RUNNING, id="engine-a", name="prod"), None)
    table.apply(record(S.RUNNING, id="engine-b", name="other"), None)
    table.set_named_routes([named("prod", "other")])
    assert find(table, "prod").engine_id == "engine-b"
    table.set_named_routes([named("prod", "prod")])
    assert find(table, "prod").engine_id == "engine-a"
    table.set_named_routes([named(DEFAULT_MODEL, "engine-a")])
    assert (find(table, DEFAULT_MODEL).engine_id, find(table, "prod").engine_id) == ("engine-a", "engine-a")


def test_a_route_leads_to_engines_by_id_name_and_model_but_not_to_another_route() -> None:
    table = table_of(("engine-a", S.RUNNING), name="assistant", model="org/base")
    for target in ("engine-a", "assistant", "org/base"):
        table.set_named_routes([named("prod", target)])
        assert find(table, "prod").engine_id == "engine-a"
    table.set_named_routes([named("prod", "assistant"), named("test", "prod")])
    with pytest.raises(NotFound, match=r"serves the route 'test'\. Engines of the route: prod"):
        find(table, "test")


@pytest.mark.parametrize(
    ("states", "unresponsive", "found"),
    [
        ({"one": S.RUNNING, "two": S.RUNNING, "base": S.RUNNING}, "one", "two"),
        ({"one": S.STARTING, "two": S.STOPPING, "base": S.RUNNING}, "", "base"),
        ({"one": S.RUNNING, "base": S.RUNNING}, "one", "base"),
        ({"one": S.STARTING, "base": S.RUNNING}, "base", "one"),
        ({"one": S.STARTING, "base": S.STARTING}, "", "one"),
        ({"base": S.STARTING}, "", "base"),
    ],
)
def test_a_route_prefers_responsive_engines_to_starting_engines_and_its_own_engines_to_the_fallback(
    states: dict[str, EngineState], unresponsive: str, found: str
) -> None:
    table = table_of(*states.items())
    for engine_id, state in states.items():
        table.apply(record(state, id=engine_id, name=engine_id, version=2), None)
    table.set_named_routes([named("prod", "one", "two", fallback="base")])
    assert find(table, "prod", unresponsive).engine_id == found


def test_all_requests_of_one_client_to_a_split_route_go_to_the_same_engine() -> None:
    table = RoutingTable("n")
    for name in ("one", "two"):
        table.apply(record(S.RUNNING, id=name, name=name), None)
    table.set_named_routes([named("prod", "one", "two")])
    engines = {user: {table.find("prod", K.LLM, lambda _: True, user).engine_id for _ in range(20)} for user in "abcdefgh"}
    assert all(len(found) == 1 for found in engines.values())
    assert {table.find("prod", K.LLM, lambda _: True).engine_id for _ in range(100)} == {"one", "two"}


def test_a_route_that_another_process_writes_reaches_the_table_through_the_change_feed(tmp_path: Path) -> None:
    async def follow() -> None:
        store = Store(open_database(f"sqlite:///{tmp_path}/engines.db"))
        lease = lease_of(store)
        store.add(record(S.RUNNING), "user", lease)
        store.set_route("early", [RouteTarget(engine="m")], None, actor="user", lease=lease)
        table = RoutingTable("n")
        following = asyncio.create_task(table.follow(store, await table.load(store)))
        assert find(table, "early").engine_id == "engine-a"
        change = table.next_change()
        store.set_route("late", [RouteTarget(engine="m")], None, actor="user", lease=lease)
        await change.wait()
        assert find(table, "late").engine_id == "engine-a"
        following.cancel()

    asyncio.run(follow())


def test_a_paused_engine_is_loaded_again_even_if_another_engine_of_its_route_answers_the_request() -> None:
    wanted: list[str] = []
    table = RoutingTable("n", wanted.append)
    for name, state in (("one", S.PAUSED), ("two", S.PAUSED), ("base", S.RUNNING)):
        table.apply(record(state, id=name, name=name), None)
    assert find(table, "one").engine_id == "one"
    assert wanted == []  # the request itself waits for the engine
    table.set_named_routes([named("prod", "one", fallback="base"), named("both", "one", "two", fallback="base")])
    assert (find(table, "prod").engine_id, wanted) == ("base", ["one"])
    assert (find(table, "both").engine_id, len(wanted)) == ("base", 2)


def test_a_request_waits_for_an_engine_that_is_being_paused_but_not_for_an_engine_that_stops() -> None:
    table = RoutingTable("n")
    table.apply(record(S.STOPPING, DesiredState.PAUSED, idle_stop_minutes=5.0), None)
    assert find(table, "m").state is S.STOPPING
    table.apply(record(S.STOPPING, DesiredState.STOPPED, idle_stop_minutes=5.0, version=2), None)
    with pytest.raises(NotFound):
        find(table, "m")
