"""Pages, filters and the change feed over HTTP, with engines that exist only in the store."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from engines import record
from gateways import gateway, until

from sage.common.identity import ProcessIdentity
from sage.common.settings import load_settings
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.node import open_state_folder
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.records import Lease
from sage.llm.control_plane.store.store import Store
from sage.llm.gateway.app import create_app

ENGINES, EVENTS = "/v1/management/engines", "/v1/management/events"
KINDS = (EngineKind.LLM, EngineKind.EMBEDDING, EngineKind.FINETUNE)
STATES = (EngineState.STOPPED, EngineState.FAILED, EngineState.COMPLETED)


def stored(count: int) -> tuple[Store, Lease]:
    """Create a store with ended engines of all kinds in turn. Return the store, and a lease that another process holds."""
    node, store = open_state_folder(), Store(open_database(load_settings().store_url))
    store.register_node(node, "host")
    lease = store.acquire_lease(node, "another", "host", ProcessIdentity.of(1))
    assert lease
    for number in range(count):
        engine = record(STATES[number % 3], id=_id(number), kind=KINDS[number % 3], node=node, figures={})
        store.add(engine, "user", lease)
    return store, lease


def _id(number: int) -> str:
    return f"engine-{number:010d}"


def ask(test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run a test against an application that is not started, so that it neither reconciles nor takes the lease."""

    async def main() -> None:
        transport = httpx.ASGITransport(create_app(load_settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8889") as client:
            await asyncio.wait_for(test(client), 60)

    asyncio.run(main())


def test_pages_hold_every_engine_once_in_either_order() -> None:
    stored(7)

    async def test(client: httpx.AsyncClient) -> None:
        for order, expected in (("asc", range(7)), ("desc", reversed(range(7)))):
            found: list[str] = []
            params: dict[str, Any] = {"limit": 3, "order": order}
            while True:
                page = (await client.get(ENGINES, params=params)).json()
                found += [engine["id"] for engine in page["data"]]
                assert (page["object"], page["last_id"]) == ("list", found[-1])
                assert page["first_id"] == page["data"][0]["id"]
                if not page["has_more"]:
                    break
                params["after"] = page["last_id"]
            assert found == [_id(number) for number in expected]

    ask(test)


def test_filters_name_states_and_kinds_separated_by_commas() -> None:
    stored(6)

    async def found(client: httpx.AsyncClient, query: str) -> list[str]:
        return [engine["id"] for engine in (await client.get(f"{ENGINES}?{query}")).json()["data"]]

    async def test(client: httpx.AsyncClient) -> None:
        assert await found(client, "state=stopped") == [_id(0), _id(3)]
        assert await found(client, "state=failed,completed") == [_id(number) for number in (1, 2, 4, 5)]
        assert await found(client, "kind=finetune,embedding&state=failed") == [_id(1), _id(4)]
        assert await found(client, "state=running") == []

    ask(test)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"{ENGINES}?limit=0", "limit"),
        (f"{ENGINES}?limit=1001", "limit"),
        (f"{ENGINES}?state=busy", "state"),
        (f"{ENGINES}?state=", "state"),
        (f"{ENGINES}?kind=llm,", "kind"),
        (f"{ENGINES}?order=newest", "order"),
        (f"{ENGINES}?after=engine-unknown", "after"),
        (f"{EVENTS}?after=-1", "after"),
        (f"{EVENTS}?after=newest", "after"),
        (f"{EVENTS}?limit=1001", "limit"),
        (f"{ENGINES}/engine-a/training?after=-1", "after"),
        (f"{ENGINES}/engine-a/training?max_points=1", "max_points"),
    ],
)
def test_an_invalid_parameter_is_named_in_a_400_error(path: str, param: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    ask(test)


def test_the_error_for_an_unknown_state_lists_the_valid_states() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        message = (await client.get(f"{ENGINES}?state=busy")).json()["error"]["message"]
        assert "busy" in message
        assert all(state in message for state in EngineState)

    ask(test)


def test_the_change_feed_is_read_in_parts_by_its_cursor() -> None:
    stored(5)

    async def test(client: httpx.AsyncClient) -> None:
        first = (await client.get(f"{EVENTS}?limit=3")).json()
        assert ([event["engine_id"] for event in first["data"]], first["has_more"]) == ([_id(0), _id(1), _id(2)], True)
        rest = (await client.get(EVENTS, params={"after": first["last_id"]})).json()
        assert ([event["engine_id"] for event in rest["data"]], rest["has_more"]) == ([_id(3), _id(4)], False)
        none = (await client.get(EVENTS, params={"after": rest["last_id"]})).json()
        assert none == {"object": "list", "data": [], "last_id": rest["last_id"], "has_more": False}

    ask(test)


def test_the_followed_change_feed_continues_from_the_last_event_id_and_sends_new_events() -> None:
    async def main() -> None:
        store, lease = stored(3)
        cursor = store.events(0, limit=2)[-1].id
        async with gateway() as client:
            headers = {"Last-Event-ID": str(cursor)}
            async with client.stream("GET", f"{EVENTS}?follow=true&after=0", headers=headers) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = (line async for line in answer.aiter_lines() if line)
                assert (await _next_event(lines))["engine_id"] == _id(2)
                removed = store.get(_id(0))
                await asyncio.to_thread(store.remove, removed, actor="user", lease=lease)
                event = await _next_event(lines)
                assert (event["engine_id"], event["kind"]) == (_id(0), "removed")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_after_latest_returns_the_newest_cursor() -> None:
    store, _ = stored(3)

    async def test(client: httpx.AsyncClient) -> None:
        newest = (await client.get(f"{EVENTS}?after=latest&limit=1")).json()
        assert newest == {"object": "list", "data": [], "last_id": store.last_event(), "has_more": False}

    ask(test)


def test_a_stream_after_latest_begins_with_the_next_event_and_is_kept_alive_by_comments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sage.llm.gateway.event_streams._KEEP_ALIVE_SECONDS", 0.01)

    async def main() -> None:
        store, lease = stored(3)
        async with gateway() as client, client.stream("GET", f"{EVENTS}?follow=true&after=latest") as answer:
            lines = (line async for line in answer.aiter_lines() if line)
            assert await anext(lines) == ": keep-alive"
            await asyncio.to_thread(store.remove, store.get(_id(0)), actor="user", lease=lease)
            events = (line async for line in lines if not line.startswith(":"))
            event = await _next_event(events)
            assert (event["engine_id"], event["kind"]) == (_id(0), "removed")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_events_of_an_engine_continue_after_the_last_event_id_until_the_engine_has_ended() -> None:
    async def main() -> None:
        store, lease = stored(1)
        engine = record(EngineState.QUEUED, id=_id(1), node=store.get(_id(0)).node)
        created = store.add(engine, "user", lease)
        async with gateway() as client:
            headers = {"Last-Event-ID": str(created.last_event)}
            async with client.stream("GET", f"{ENGINES}/{_id(1)}/events", headers=headers) as answer:
                await asyncio.to_thread(store.transition, created, EngineState.FAILED, actor="user", lease=lease)
                lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
            [event] = [json.loads(line.removeprefix("data: ")) for line in lines]
            assert (event["before"], event["after"]) == ("queued", "failed")
            url = f"{ENGINES}/{_id(1)}/events?follow=false&after={created.last_event - 1}"
            assert (await client.get(url)).text.count("event:") == 2
            assert (await client.get(f"{ENGINES}/{_id(1)}/events", headers={"Last-Event-ID": "x"})).status_code == 400

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_stream_of_events_ends_if_the_client_disconnects() -> None:
    async def main() -> None:
        store, lease = stored(1)
        store.add(record(EngineState.QUEUED, id=_id(1), node=store.get(_id(0)).node), "user", lease)
        async with gateway() as client:
            manager = client.app.state.manager  # type: ignore[attr-defined]
            get_events, readers = manager.get_events, set[Any]()

            async def observed(*arguments: Any) -> Any:
                readers.add(asyncio.current_task())
                return await get_events(*arguments)

            manager.get_events = observed
            async with client.stream("GET", f"{ENGINES}/{_id(1)}/events") as answer:
                await anext(answer.aiter_lines())
                await until(lambda: len(readers) > 1, "the wait for new events")
            await until(lambda: all(task.done() for task in readers), "the end of the stream")

    asyncio.run(asyncio.wait_for(main(), 60))


async def _next_event(lines: Any) -> dict[str, Any]:
    id_line, event_line, data_line = [await anext(lines) for _ in range(3)]
    event: dict[str, Any] = json.loads(data_line.removeprefix("data: "))
    assert (id_line, event_line) == (f"id: {event['id']}", f"event: {event['kind']}")
    return event


def test_pause_and_resume_change_the_desired_state_and_a_settled_engine_cannot_be_paused() -> None:
    async def main() -> None:
        store, lease = stored(1)
        queued = record(
            EngineState.QUEUED, id=_id(1), node=store.get(_id(0)).node, not_before=datetime(2100, 1, 1, tzinfo=UTC)
        )
        store.add(queued, "user", lease)
        store.release_lease(lease)
        async with gateway() as client:
            answer = await client.post(f"{ENGINES}/{_id(0)}/pause")
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_pausable")
            assert (await client.post(f"{ENGINES}/{_id(1)}/pause")).json()["desired"] == "paused"
            await until(lambda: store.get(_id(1)).state is EngineState.PAUSED, "the pause")
            assert (await client.post(f"{ENGINES}/{_id(1)}/resume")).json()["desired"] == "running"
            await until(lambda: store.get(_id(1)).state is EngineState.QUEUED, "the return into the queue")

    asyncio.run(asyncio.wait_for(main(), 60))


def test_ready_reports_role_and_counts() -> None:
    stored(4)

    async def test(client: httpx.AsyncClient) -> None:
        ready = (await client.get("/ready")).json()
        assert ready["role"] in ("active", "standby")
        assert (ready["engines"], ready["states"]) == (4, {"stopped": 2, "failed": 1, "completed": 1})

    ask(test)


def test_a_standby_answers_reads_and_refuses_writes_with_the_address_of_the_active_gateway() -> None:
    async def main() -> None:
        async with gateway() as active, gateway(standby=True) as standby:
            assert (await active.get("/ready")).json()["role"] == "active"
            assert (await standby.get("/ready")).json()["role"] == "standby"
            assert (await standby.get(ENGINES)).json()["data"] == []
            answers = [
                await standby.delete(f"{ENGINES}/{_id(0)}"),
                await standby.post(f"{ENGINES}/start", json={"model": "m"}),
            ]
            for answer in answers:
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "standby")
                assert str(active.base_url) in answer.json()["error"]["message"]
                assert int(answer.headers["retry-after"]) > 0

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_engine_of_another_node_can_be_read_but_not_changed() -> None:
    store, own_lease = stored(0)
    store.release_lease(own_lease)
    store.register_node("node-b", "host-b")
    lease = store.acquire_lease("node-b", "another", "host-b", ProcessIdentity.of(1))
    assert lease
    store.add(replace(record(EngineState.STOPPED), node="node-b", id=_id(0), figures={}), "user", lease)

    async def main() -> None:
        async with gateway() as client:
            assert (await client.get(f"{ENGINES}/{_id(0)}")).json()["node"] == "node-b"
            for answer in (await client.post(f"{ENGINES}/{_id(0)}/resume"), await client.get(f"{ENGINES}/{_id(0)}/logs")):
                assert (answer.status_code, answer.json()["error"]["code"]) == (409, "other_node")
                assert "node-b" in answer.json()["error"]["message"]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_memory_of_an_engine_is_estimated_over_http() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        request = {"model": "smollm2-135m-instruct", "options": {"slots": 2}}
        answer = await client.post("/v1/management/estimate", json=request)
        estimate = answer.json()
        assert (answer.status_code, estimate["backend"]) == (200, "transformers")
        assert estimate["total_bytes"] == sum(estimate["parts"].values())
        answer = await client.post("/v1/management/estimate", json={"model": "missing/model"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    ask(test)
