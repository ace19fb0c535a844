"""Tests of the webhook messages in the store. They must pass with every kind of database."""

import json

import pytest
from engines import record
from store_promises import lease_of

from sage.llm.client.types import EngineState, Reason
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store

S = EngineState


class OutboxPromises:
    @pytest.fixture
    def store(self, database_url: str) -> Store:
        store = Store(open_database(database_url))
        store.endpoints = ("a", "b")
        return store

    def test_each_announced_state_has_a_message_for_each_endpoint(self, store: Store) -> None:
        lease = lease_of(store)
        engine = store.add(record(S.STARTING, metadata={"team": "search"}), "user", lease)
        engine = store.transition(engine, S.RUNNING, actor="r", lease=lease)
        engine = store.transition(engine, S.STOPPING, actor="r", lease=lease)
        reason = Reason(code="engine_died", message="It exited.")
        engine = store.transition(engine, S.FAILED, actor="r", lease=lease, reason=reason)
        for endpoint in ("a", "b"):
            messages = store.messages("n", endpoint, limit=9)
            contents = [json.loads(message.body) for message in messages]
            assert [content["type"] for content in contents] == ["engine.running", "engine.failed"]
            assert messages[1].id == f"msg_n_{engine.last_event}"
            assert contents[1]["timestamp"] == engine.state_at.isoformat()
            assert contents[1]["data"] == {
                "id": "engine-a", "kind": "llm", "name": "m", "model": "m", "state": "failed", "restarts": 0, "node": "n",
                "reason": {"code": "engine_died", "message": "It exited.", "hint": ""}, "metadata": {"team": "search"},
                "event_id": engine.last_event,
            }  # fmt: skip

    def test_a_message_is_kept_without_its_engine_and_is_read_after_messages_with_fewer_attempts(self, store: Store) -> None:
        lease = lease_of(store)
        for name in ("engine-a", "engine-b"):
            engine = store.add(record(S.RUNNING, id=name), "user", lease)
            engine = store.transition(engine, S.COMPLETED, actor="r", lease=lease)
            store.remove(engine, actor="user", lease=lease)
        first, second = store.messages("n", "a", limit=9)
        store.count_attempt(first)
        assert [(message.event_id, message.attempts) for message in store.messages("n", "a", limit=9)] == [
            (second.event_id, 0), (first.event_id, 1),
        ]  # fmt: skip
        store.remove_message(second)
        assert [message.event_id for message in store.messages("n", "a", limit=9)] == [first.event_id]
        assert len(store.messages("n", "b", limit=9)) == 2
        assert store.messages("another", "a", limit=9) == []

    def test_the_messages_of_endpoints_that_are_no_longer_set_are_deleted(self, store: Store) -> None:
        lease = lease_of(store)
        store.transition(store.add(record(S.RUNNING), "user", lease), S.COMPLETED, actor="r", lease=lease)
        store.endpoints = ("b",)
        store.remove_other_endpoints("n")
        assert (len(store.messages("n", "a", limit=9)), len(store.messages("n", "b", limit=9))) == (0, 1)
