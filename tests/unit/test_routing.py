"""The routing table: which engine a request means."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from store_promises import lease_of

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import DEFAULT_MODEL, EngineKind, EngineState
from sage.llm.control_plane.routing import Route, RoutingTable
from sage.llm.control_plane.store.database import open_database
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
def test_the_newest_that_runs_and_responds_serves_and_the_others_wait(
    states: list[tuple[str, EngineState]], unresponsive: str, found: str, model: str, reverse: bool
) -> None:
    table = RoutingTable("n")
    for number, (name, state) in sorted(enumerate(states), reverse=reverse):  # whatever the order in which they are read
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


def test_the_only_engine_that_runs_and_does_not_respond_is_reported_and_not_waited_for() -> None:
    with pytest.raises(Overloaded, match="does not respond"):
        find(table_of(("engine-a", S.RUNNING)), "m", unresponsive="engine-a")


def test_a_model_that_nobody_serves_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(NotFound, match="serves the model 'x'; there are: m"):
        find(table_of(("engine-a", S.RUNNING)), "x")
    with pytest.raises(NotFound, match="there are: none") as caught:
        find(table_of(), "x" * 5000)
    assert len(str(caught.value)) < 500
    many = RoutingTable("n")
    for number in range(1000):
        many.apply(record(S.RUNNING, id=f"engine-{number}", name=f"name-{number}", first_event=number), None)
    with pytest.raises(NotFound, match=r"there are: name-\d+, .*, …\.") as caught:
        find(many, "x")
    assert len(str(caught.value)) < 500


def test_a_route_leads_to_the_server_and_names_the_engine_as_the_server_does() -> None:
    table = RoutingTable("n")
    table.apply(record(S.RUNNING, served_as="sage-a-1"), server(address="127.0.0.1:9000"))
    route = find(table, "m")
    assert (route.address, route.model_name) == ("127.0.0.1:9000", "sage-a-1")


def test_an_older_version_of_an_engine_changes_nothing() -> None:
    table = table_of(("engine-a", S.RUNNING), version=5)
    table.apply(record(S.STARTING, version=4), None)
    assert find(table, "m").state is S.RUNNING


def test_engines_that_ended_were_removed_or_are_of_another_node_are_not_routed() -> None:
    table = table_of(("ended", S.RUNNING), ("removed", S.RUNNING))
    table.apply(record(S.FAILED, id="ended"), None)
    table.forget("removed")
    table.forget("never-known")
    table.apply(record(S.RUNNING, id="elsewhere", node="other"), server(node="other"))
    with pytest.raises(NotFound, match="there are: none"):
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


def test_the_routes_of_a_kind_are_listed_the_running_ones_first() -> None:
    table = table_of(("a", S.RUNNING), ("b", S.STARTING), ("c", S.RUNNING), ("d", S.STOPPING))
    assert [route.engine_id for route in table.routes(K.LLM)] == ["c", "a", "b"]
    assert table.routes(K.EMBEDDING) == []


def test_a_look_up_does_not_grow_with_the_number_of_engines() -> None:
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


def test_whoever_waits_for_an_engine_is_woken_by_a_change_that_came_before_it_began_to_wait() -> None:
    async def wait() -> None:
        table = RoutingTable("n")
        change = table.wait_for_change()
        table.apply(record(S.STARTING), None)
        await change
        change = asyncio.ensure_future(table.wait_for_change())
        await asyncio.sleep(0)
        assert not change.done()
        table.forget("engine-a")
        await change

    asyncio.run(wait())


def test_what_another_process_writes_reaches_the_table_through_the_change_feed(tmp_path: Path) -> None:
    async def follow() -> None:
        store = Store(open_database(f"sqlite:///{tmp_path}/engines.db"))
        lease = lease_of(store)
        engine = store.add(record(), "user", lease)
        ended = store.add(record(S.STOPPED, id="engine-b"), "user", lease)
        table = RoutingTable("n")
        following = asyncio.create_task(table.follow(store, await table.load(store)))
        assert [route.engine_id for route in table.routes(K.LLM)] == ["engine-a"]
        change = table.wait_for_change()
        engine = store.transition(engine, S.STARTING, actor="r", lease=lease, put_server=server(), server_id="server-a")
        store.remove(ended, actor="user", lease=lease)
        await change
        assert find(table, "m").address == "127.0.0.1:9000"
        change = table.wait_for_change()
        store.transition(engine, S.FAILED, actor="r", lease=lease, leave_server="server-a")
        await change
        assert table.routes(K.LLM) == []
        following.cancel()

    asyncio.run(follow())


def test_an_error_of_the_database_does_not_end_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        change = table.wait_for_change()
        with database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE aside RENAME TO engine_events")
        store.add(record(), "user", lease)
        await change
        following.cancel()

    asyncio.run(follow())
