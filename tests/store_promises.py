"""Tests of the store that every database must pass. The test classes of each database inherit these tests."""

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from engines import record, server

from sage.common.errors import ConfigError, Conflict, NotFound
from sage.common.identity import ProcessIdentity
from sage.llm.client.types import SETTLED, DesiredState, EngineKind, EngineState, EventKind, Reason, RouteTarget
from sage.llm.control_plane.states import IllegalTransition
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord, ServerState
from sage.llm.control_plane.store.store import StaleWrite, Store

S, K = EngineState, EngineKind
DIED = Reason(code="engine_died", message="It exited with code 1.")
ME = ProcessIdentity.of(1)
EXITED = ProcessIdentity(1, "an earlier boot/5")


def lease_of(store: Store, node: str = "n", holder: str = "holder") -> Lease:
    store.register_node(node, "host")
    lease = store.acquire_lease(node, holder, "host", ME)
    assert lease
    return lease


def _settled(store: Store, lease: Lease, state: EngineState, **values: object) -> EngineRecord:
    return store.add(record(state, **values), "user", lease)


class Stored:
    @pytest.fixture
    def store(self, database_url: str) -> Store:
        return Store(open_database(database_url))

    @pytest.fixture
    def lease(self, store: Store) -> Lease:
        return lease_of(store)


class StorePromises(Stored):
    def test_a_record_is_read_as_it_was_written(self, store: Store, lease: Lease) -> None:
        values = {"options": {"a": [1, None]}, "metadata": {"team": "x"}, "figures": {"loss": 1.5}, "devices": ("cuda:0",),
                  "reserved_bytes": 80_000_000_000, "requested_port": 9000, "force": True, "reason": DIED}  # fmt: skip
        given = record(S.VALIDATING, **values)
        added = store.add(given, "user", lease)
        assert added == store.get("engine-a")
        unset = {"created_at": given.created_at, "state_at": given.state_at, "first_event": 0, "last_event": 0}
        assert replace(added, **unset) == given
        assert added.first_event == added.last_event == store.last_event()

    def test_times_are_set_by_the_database_and_are_in_utc(self, store: Store, lease: Lease) -> None:
        added = store.add(record(created_at=datetime(2000, 1, 1, tzinfo=UTC)), "user", lease)
        assert abs(added.created_at - datetime.now(UTC)) < timedelta(minutes=1)
        assert added.created_at.utcoffset() == timedelta(0)
        assert abs(store.events(limit=1)[0].at - added.created_at) < timedelta(minutes=1)

    def test_every_transition_is_kept_with_its_reason_and_actor(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        engine = store.transition(engine, S.STARTING, actor="reconciler", lease=lease, restarts=1)
        engine = store.transition(engine, S.FAILED, actor="reconciler", lease=lease, reason=DIED, figures={"step": 3})
        assert engine == store.get("engine-a")
        assert (engine.state, engine.reason, engine.restarts, engine.figures) == (S.FAILED, DIED, 1, {"step": 3})
        assert [(e.kind, e.before, e.after, e.actor, e.reason) for e in store.events(limit=9)] == [
            (EventKind.CREATED, None, S.QUEUED, "user", ""),
            (EventKind.TRANSITION, S.QUEUED, S.STARTING, "reconciler", ""),
            (EventKind.TRANSITION, S.STARTING, S.FAILED, "reconciler", DIED.message),
        ]
        assert engine.last_event == store.last_event()
        assert store.active("n") == []
        engine = store.transition(engine, S.VALIDATING, actor="user", lease=lease)
        assert (engine.reason, store.active("n")) == (None, [engine])

    def test_an_illegal_transition_is_refused(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        with pytest.raises(IllegalTransition, match="queued → completed"):
            store.transition(engine, S.COMPLETED, actor="reconciler", lease=lease)
        assert store.get("engine-a") == engine

    def test_a_server_is_added_and_removed_in_a_transition_of_its_engine(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        planned = server(ServerState.PLANNED, address=None)
        engine = store.transition(engine, S.STARTING, actor="r", lease=lease, put_server=planned, server_id="server-a")
        [stored] = store.servers("n")
        assert stored == replace(planned, created_at=stored.created_at)
        launched = store.update_server(stored, lease=lease, state=ServerState.LAUNCHED, address="127.0.0.1:1")
        assert (launched.version, launched.address, store.servers("n")) == (2, "127.0.0.1:1", [launched])
        assert store.hosted(["engine-a", "engine-unknown"]) == [(engine, launched)]
        with pytest.raises(StaleWrite):
            store.update_server(stored, lease=lease, address="127.0.0.1:2")
        engine = store.transition(engine, S.FAILED, actor="r", lease=lease, leave_server="server-a")
        assert store.servers("n") == []
        assert store.hosted(["engine-a"]) == [(engine, None)]

    def test_engines_join_a_server_until_the_server_closes_and_the_last_engine_removes_the_server(
        self, store: Store, lease: Lease
    ) -> None:
        first, second, third = (store.add(record(id=f"engine-{name}"), "user", lease) for name in "abc")
        starting: dict[str, Any] = {"actor": "r", "lease": lease}
        first = store.transition(first, S.STARTING, put_server=server(), server_id="server-a", **starting)
        second = store.transition(second, S.STARTING, join_server="server-a", revision=1, **starting)
        assert (second.server_id, second.revision) == ("server-a", 1)
        [stored] = store.servers("n")
        with pytest.raises(StaleWrite):  # the server still hosts another engine
            store.close_server(stored, first, lease=lease)
        assert store.is_server_needed("server-a", first.id)
        first = store.transition(first, S.FAILED, leave_server="server-a", must_remain=True, **starting)
        assert store.servers("n") == [stored]
        with pytest.raises(StaleWrite):  # the server would host no engine
            store.transition(second, S.FAILED, leave_server="server-a", must_remain=True, **starting)
        store.close_server(stored, second, lease=lease)
        with pytest.raises(StaleWrite):
            store.transition(third, S.STARTING, join_server="server-a", **starting)
        assert store.get(third.id) == third
        store.transition(second, S.FAILED, leave_server="server-a", **starting)
        assert store.servers("n") == []
        assert store.is_server_needed("server-a", first.id)  # the second engine still needs the server's log
        assert not store.is_server_needed("server-b", first.id)
        with pytest.raises(StaleWrite):
            store.transition(third, S.STARTING, join_server="server-a", **starting)

    def test_only_an_engine_that_wakes_a_sleeping_server_joins_it(self, store: Store, lease: Lease) -> None:
        first, second = (store.add(record(id=f"engine-{name}"), "user", lease) for name in "ab")
        starting: dict[str, Any] = {"actor": "r", "lease": lease}
        first = store.transition(first, S.STARTING, put_server=server(), server_id="server-a", **starting)
        [stored] = store.servers("n")
        store.close_server(stored, first, lease=lease, state=ServerState.SLEEPING)
        with pytest.raises(StaleWrite):
            store.transition(second, S.STARTING, join_server="server-a", **starting)
        waking = {"state": ServerState.WAKING}
        second = store.transition(second, S.STARTING, join_server="server-a", join_values=waking, **starting)
        assert [each.state for each in store.servers("n")] == [ServerState.WAKING]

    def test_two_engines_swap_servers_in_one_write(self, store: Store, lease: Lease) -> None:
        starting: dict[str, Any] = {"actor": "r", "lease": lease}
        engine, merger = (store.add(record(id=f"engine-{name}"), "user", lease) for name in "ab")
        host = {name: server(id=f"server-{name}") for name in "ab"}
        engine = store.transition(engine, S.STARTING, put_server=host["a"], server_id="server-a", base="/base",
                                  adapter="/a", served_as="sage-a-1", merger_id="engine-b", **starting)  # fmt: skip
        merger = store.transition(merger, S.STARTING, put_server=host["b"], server_id="server-b", backend="llamacpp",
                                  dedicated=True, served_as="sage-b-1", **starting)  # fmt: skip
        with pytest.raises(StaleWrite):
            store.swap_servers(engine, replace(merger, version=1), form="merged", **starting)
        assert store.get("engine-a") == engine
        merged, old = store.swap_servers(engine, merger, form="merged", **starting)
        assert (merged.server_id, merged.served_as, merged.base, merged.adapter) == ("server-b", "sage-b-1", None, None)
        assert (merged.backend, merged.form, merged.merger_id, merged.dedicated) == ("llamacpp", "merged", None, True)
        assert (old.server_id, old.served_as, old.adapter, old.backend) == ("server-a", "sage-a-1", "/a", "transformers")
        assert (old.desired, old.state) == (DesiredState.STOPPED, S.STARTING)
        assert {event.engine_id for event in store.events(store.last_event() - 2, limit=9)} == {"engine-a", "engine-b"}

    def test_if_two_engines_leave_a_server_at_once_the_server_keeps_one_of_them(self, store: Store, lease: Lease) -> None:
        for round_ in range(5):
            ids, host = [f"engine-{round_}{name}" for name in "ab"], server(id=f"server-{round_}")
            a, b = (store.add(record(id=engine_id), "user", lease) for engine_id in ids)
            a = store.transition(a, S.STARTING, actor="r", lease=lease, put_server=host, server_id=host.id)
            b = store.transition(b, S.STARTING, actor="r", lease=lease, join_server=host.id)

            def leave(engine: EngineRecord, host: ServerRecord = host) -> bool:
                try:
                    store.transition(engine, S.STOPPED, actor="r", lease=lease, leave_server=host.id, must_remain=True)
                except StaleWrite:
                    return False
                return True

            with ThreadPoolExecutor(2) as pool:
                assert sorted(pool.map(leave, (a, b))) == [False, True]
            assert len(store.servers("n")) == round_ + 1

    def test_a_newer_version_of_an_engine_s_model_is_written_without_a_transition(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        revised = store.revise(engine, actor="r", lease=lease, served_as="sage-a-2")
        assert (revised.served_as, revised.state, revised.version) == ("sage-a-2", engine.state, 2)
        assert store.events(engine.last_event, limit=9)[0].kind is EventKind.UPDATED
        with pytest.raises(StaleWrite):
            store.revise(engine, actor="r", lease=lease, served_as="sage-a-3")

    def test_a_restart_is_one_write_with_two_events(
        self, store: Store, lease: Lease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(connection: object, engine_id: str, *args: object, after: EngineState, **values: object) -> int:
            if after is S.QUEUED:
                raise OSError("killed between the two events")
            return write_event(connection, engine_id, *args, after=after, **values)

        queued = store.add(record(server_id="server-a"), "user", lease)
        starting = store.transition(queued, S.STARTING, actor="r", lease=lease, put_server=server())
        values: dict[str, Any] = {"reason": Reason(code="c", message="died"), "leave_server": "server-a", "restarts": 1}
        with pytest.raises(StaleWrite):
            store.restart(queued, actor="r", lease=lease, **values)
        with pytest.raises(IllegalTransition):
            store.restart(replace(starting, state=S.COMPLETED), actor="r", lease=lease, **values)
        write_event: Any = Store._event
        with monkeypatch.context() as patched:
            patched.setattr(Store, "_event", staticmethod(broken))
            with pytest.raises(OSError, match="between"):
                store.restart(starting, actor="r", lease=lease, **values)
        assert store.get("engine-a") == starting
        assert len(store.servers("n")) == 1
        again = store.restart(starting, actor="r", lease=lease, figures={"loss": 1.0}, **values)
        assert again == store.get("engine-a")
        assert (again.state, again.restarts, again.reason, again.figures) == (S.QUEUED, 1, values["reason"], {"loss": 1.0})
        assert store.servers("n") == []
        assert [event.after for event in store.events(limit=9)][2:] == [S.FAILED, S.QUEUED]

    def test_the_desired_state_is_stored_and_reported_by_the_change_feed(self, store: Store, lease: Lease) -> None:
        engine = store.add(record(), "user", lease)
        asked = store.set_desired(engine, DesiredState.STOPPED, force=True, actor="user", lease=lease)
        assert (asked.desired, asked.force, asked.state, asked.version) == (DesiredState.STOPPED, True, S.QUEUED, 2)
        event = store.events(engine.last_event, limit=1)[0]
        assert (event.kind, event.reason, asked.last_event) == (EventKind.DESIRED, "stopped by force", engine.last_event)

    def test_a_request_is_recorded_without_a_lease_and_a_pause_that_was_planned_earlier_fails(
        self, store: Store, lease: Lease
    ) -> None:
        idle = store.add(record(S.QUEUED, idle_stop_minutes=5.0), "user", lease)
        before = store.last_event()
        touched = store.touch("engine-a")
        assert touched == store.get("engine-a")
        assert touched.last_request_at
        assert abs(touched.last_request_at - datetime.now(UTC)) < timedelta(minutes=1)
        pause: dict[str, Any] = {"force": False, "actor": "r", "lease": lease, "last_request_at": None}
        with pytest.raises(StaleWrite):
            store.set_desired(idle, DesiredState.PAUSED, **pause)
        paused = store.set_desired(touched, DesiredState.PAUSED, **pause)
        assert (paused.desired, paused.last_request_at) == (DesiredState.PAUSED, None)
        assert [event.kind for event in store.events(before, limit=9)] == [EventKind.DESIRED]
        with pytest.raises(NotFound):
            store.touch("engine-unknown")

    def test_a_write_based_on_an_outdated_read_changes_nothing(self, store: Store, lease: Lease) -> None:
        stale = store.add(record(), "user", lease)
        current = store.set_desired(stale, DesiredState.STOPPED, force=False, actor="user", lease=lease)
        before = store.last_event()
        with pytest.raises(StaleWrite):
            store.transition(stale, S.STARTING, actor="r", lease=lease, put_server=server())
        with pytest.raises(StaleWrite):
            store.set_desired(stale, DesiredState.RUNNING, force=False, actor="user", lease=lease)
        with pytest.raises(StaleWrite):
            store.remove(stale, actor="user", lease=lease)
        assert (store.get("engine-a"), store.servers("n"), store.last_event()) == (current, [], before)

    def test_only_the_removal_event_of_a_removed_engine_is_kept(self, store: Store, lease: Lease) -> None:
        store.remove(_settled(store, lease, S.STOPPED), actor="user", lease=lease)
        with pytest.raises(NotFound, match="No engine 'engine-a'"):
            store.get("engine-a")
        assert [(e.kind, e.before, e.actor) for e in store.events(limit=9)] == [(EventKind.REMOVED, S.STOPPED, "user")]

    def test_two_active_engines_of_a_node_cannot_have_the_same_port(self, store: Store, lease: Lease) -> None:
        first = store.add(record(requested_port=9000), "user", lease)
        with pytest.raises(Conflict) as caught:
            store.add(record(id="engine-b", requested_port=9000), "user", lease)
        assert (caught.value.code, caught.value.param) == ("port_taken", "port")
        stopped = store.transition(first, S.STOPPED, actor="r", lease=lease)
        store.add(record(id="engine-b", requested_port=9000), "user", lease)
        with pytest.raises(Conflict, match="Port 9000 cannot be used"):
            store.transition(stopped, S.VALIDATING, actor="user", lease=lease)
        assert store.get("engine-a").state is S.STOPPED
        other = lease_of(store, "other")
        store.add(record(id="engine-c", node="other", requested_port=9000), "user", other)
        store.add(record(id="engine-d"), "user", lease)
        store.add(record(id="engine-e"), "user", lease)  # without a port there is no conflict

    def test_if_many_engines_with_the_same_port_are_added_at_once_only_one_is_accepted(
        self, store: Store, lease: Lease
    ) -> None:
        def add(number: int) -> bool:
            try:
                store.add(record(id=f"engine-{number}", requested_port=9000), "user", lease)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(add, range(8))) == 1
        assert len(store.active("n")) == 1

    def test_an_error_of_the_database_shows_no_values(self, store: Store, lease: Lease) -> None:
        store.add(record(options={"api": "hunter2"}), "user", lease)
        with pytest.raises(Exception, match=r"(?i)unique") as caught:
            store.add(record(options={"api": "hunter2"}), "user", lease)
        assert "hunter2" not in str(caught.value)

    def test_engines_are_in_the_order_of_their_creation(self, store: Store, lease: Lease) -> None:
        store.add(record(id="engine-b"), "user", lease)
        store.add(record(id="engine-a"), "user", lease)
        store.transition(store.get("engine-b"), S.STARTING, actor="r", lease=lease)
        first, second = store.active("n")
        assert (first.id, second.id) == ("engine-b", "engine-a")
        assert first.last_event > second.last_event

    def test_pages_of_every_filter_and_order_list_each_engine_once(self, store: Store, lease: Lease) -> None:
        other = lease_of(store, "other")
        for number, (state, kind) in enumerate(product(S, K)):
            node, held = ("n", lease) if number % 3 else ("other", other)
            store.add(record(state, kind=kind, id=f"engine-{number}", node=node), "user", held)
        every = store.page(limit=100)[0]
        assert [engine.id for engine in every] == [f"engine-{number}" for number in range(len(S) * len(K))]
        for states, kinds, node, newest_first in product(
            (None, SETTLED, [S.RUNNING], []), (None, [K.LLM, K.FINETUNE]), (None, "n"), (False, True)
        ):
            expected = [
                engine.id
                for engine in (reversed(every) if newest_first else every)
                if (states is None or engine.state in states)
                and (kinds is None or engine.kind in kinds)
                and (node is None or engine.node == node)
            ]
            listed: list[str] = []
            has_more = True
            while has_more:
                found, has_more = store.page(
                    limit=4, after=listed[-1] if listed else None, states=states, kinds=kinds, node=node,
                    newest_first=newest_first,
                )  # fmt: skip
                listed += [engine.id for engine in found]
                assert len(found) == 4 or not has_more
            assert listed == expected

    def test_a_page_after_an_unknown_engine_is_refused(self, store: Store) -> None:
        with pytest.raises(ConfigError, match="after: there is no engine 'engine-x'") as caught:
            store.page(limit=1, after="engine-x")
        assert (caught.value.code, caught.value.param) == ("cursor_unknown", "after")

    def test_engines_are_counted_by_kind_and_state(self, store: Store, lease: Lease) -> None:
        assert store.count() == {}
        for number, state in enumerate((S.RUNNING, S.RUNNING, S.FAILED)):
            store.add(record(state, id=f"engine-{number}"), "user", lease)
        assert store.count() == {(K.LLM, S.RUNNING): 2, (K.LLM, S.FAILED): 1}

    def test_the_change_feed_continues_after_a_cursor_and_can_be_limited_to_one_engine(
        self, store: Store, lease: Lease
    ) -> None:
        assert (store.last_event(), store.events(limit=9)) == (0, [])
        engine = store.add(record(), "user", lease)
        store.add(record(id="engine-b"), "user", lease)
        store.transition(engine, S.STARTING, actor="r", lease=lease)
        first, *_ = everything = store.events(limit=9)
        assert [event.engine_id for event in everything] == ["engine-a", "engine-b", "engine-a"]
        assert store.events(first.id, limit=1) == [everything[1]]
        assert store.events(limit=9, engine_id="engine-a") == [everything[0], everything[2]]
        assert store.events(first.id, limit=9, engine_id="engine-a") == [everything[2]]
        assert store.last_event() == everything[-1].id

    def test_the_id_of_an_event_is_never_used_again(self, store: Store, lease: Lease) -> None:
        store.remove(_settled(store, lease, S.STOPPED), actor="user", lease=lease)
        removed = store.last_event()
        assert store.add(record(), "user", lease).first_event > removed

    def test_a_reader_of_the_feed_misses_no_event_of_concurrent_writers(self, store: Store, lease: Lease) -> None:
        other = lease_of(store, "other")

        def write(writer: int) -> None:
            node, held = ("n", lease) if writer % 2 else ("other", other)
            engine = store.add(record(id=f"engine-{writer}", node=node), "user", held)
            for number in range(15):
                engine = store.set_desired(engine, DesiredState.RUNNING, force=number % 2 == 0, actor="u", lease=held)

        seen: list[int] = []
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, writer) for writer in range(4)]
            while wait(writers, timeout=0.005).not_done:
                seen += [event.id for event in store.events(seen[-1] if seen else 0, limit=3)]
            for writer in writers:
                writer.result()
        seen += [event.id for event in store.events(seen[-1], limit=1000)]
        assert seen == [event.id for event in store.events(limit=1000)]
        assert len(seen) == 4 * 16

    def test_a_route_is_read_as_it_was_written_last_and_the_feed_reports_each_change(
        self, store: Store, lease: Lease
    ) -> None:
        store.set_route("prod", [RouteTarget(engine="old")], None, actor="user", lease=lease)
        split = [RouteTarget(engine="new", weight=10), RouteTarget(engine="old", weight=90)]
        store.set_route("prod", split, "base", actor="user", lease=lease)
        store.set_route("a/b", split[:1], None, actor="user", lease=lease)
        store.set_route("prod", split, None, actor="user", lease=lease_of(store, "other"))
        first, second = store.routes("n")
        assert (first.name, second.name, second.engines, second.fallback) == ("a/b", "prod", tuple(split), "base")
        assert abs(second.updated_at - datetime.now(UTC)) < timedelta(minutes=1)
        store.remove_route("a/b", actor="user", lease=lease)
        before = store.last_event()
        with pytest.raises(NotFound, match="No route 'a/b'"):
            store.remove_route("a/b", actor="user", lease=lease)
        assert store.last_event() == before
        assert [route.name for route in store.routes("n")] == ["prod"]
        assert [(e.kind, e.engine_id, e.route, e.reason) for e in store.events(limit=9)] == [
            (EventKind.ROUTE, "", "prod", "old=1"),
            (EventKind.ROUTE, "", "prod", "new=10, old=90"),
            (EventKind.ROUTE, "", "a/b", "new=10"),
            (EventKind.ROUTE, "", "prod", "new=10, old=90"),
            (EventKind.ROUTE, "", "a/b", "removed"),
        ]

    def test_if_many_writers_set_a_route_the_last_write_is_kept(self, store: Store, lease: Lease) -> None:
        def write(number: int) -> None:
            store.set_route("prod", [RouteTarget(engine=f"engine-{number}")], None, actor="user", lease=lease)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(8)))
        [route] = store.routes("n")
        assert store.events(limit=99)[-1].reason == f"{route.engines[0].engine}=1"
