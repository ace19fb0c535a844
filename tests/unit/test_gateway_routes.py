"""Routes over HTTP. The engines are small HTTP servers in the test's process."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from aiohttp import web
from engines import record, server
from gateways import ASK, CHAT, engine, gateway

from sage.llm.client.types import EngineState
from sage.llm.control_plane.routing import RoutingTable

ROUTES = "/v1/management/routes"


@contextlib.asynccontextmanager
async def gateway_with(*names: str) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with running engines, each of which answers with its name."""

    def answering(name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response({"model": name, "choices": []})

        return answer

    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(gateway())
        manager = client.app.state.manager  # type: ignore[attr-defined]
        routing: RoutingTable = manager._routing
        for number, name in enumerate(names):
            port = await stack.enter_async_context(engine(answering(name)))
            running = record(
                EngineState.RUNNING, id=f"engine-{number:010}", name=name, node=manager._node, first_event=number
            )
            routing.apply(running, server(node=manager._node, address=f"127.0.0.1:{port}"))
        yield client


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def answered_by(client: httpx.AsyncClient, **body: Any) -> str:
    answer = await client.post(CHAT, json={**ASK, "model": "prod", **body})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_a_route_is_set_read_listed_and_removed() -> None:
    async def test() -> None:
        async with gateway_with("one") as client:
            body = {"engines": [{"engine": "one", "weight": 9}, {"engine": "later"}], "fallback": "base"}
            put = await client.put(f"{ROUTES}/org%2Fprod", json=body)
            assert put.status_code == 200, put.text
            route = put.json()
            assert (route["name"], route["fallback"]) == ("org/prod", "base")
            assert [list(target.values()) for target in route["engines"]] == [
                ["one", 9, "engine-0000000000", "running"],
                ["later", 1, None, None],
            ]
            assert (await client.get(f"{ROUTES}/org/prod")).json() == route
            assert (await client.get(ROUTES)).json() == {"object": "list", "data": [route]}
            assert {model["id"] for model in (await client.get("/v1/models")).json()["data"]} >= {"one", "org/prod"}
            assert (await client.delete(f"{ROUTES}/org/prod")).status_code == 200
            gone_routes = [await client.get(f"{ROUTES}/org/prod"), await client.delete(f"{ROUTES}/org/prod")]
            for gone in (*gone_routes, await client.delete(f"{ROUTES}/a%00b")):
                assert (gone.status_code, gone.json()["error"]["code"]) == (404, "route_not_found")

    run(test)


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("engine-0123456789", {"engines": [{"engine": "a"}]}, "name"),
        ("a//b", {"engines": [{"engine": "a"}]}, "name"),
        ("a%2F..%2Fb", {"engines": [{"engine": "a"}]}, "name"),
        ("two words", {"engines": [{"engine": "a"}]}, "name"),
        ("x" * 201, {"engines": [{"engine": "a"}]}, "name"),
        ("prod", {"engines": []}, "engines"),
        ("prod", {"engines": [{"engine": "a"}, {"engine": "a"}]}, "engines"),
        ("prod", {"engines": [{"engine": "a", "weight": 0}]}, "engines.0.weight"),
        ("prod", {"engines": [{"engine": "a"}], "weight": 1}, "weight"),
        ("prod", {"engines": [{"engine": "a\x00"}]}, "engines.0.engine"),
        ("prod", {"engines": [{"engine": "a"}], "fallback": "a\x00"}, "fallback"),
    ],
)
def test_a_wrong_route_is_a_400_that_names_the_field(name: str, body: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with gateway_with() as client:
            answer = await client.put(f"{ROUTES}/{name}", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    run(test)


def test_a_standby_refuses_to_set_a_route_and_follows_the_active_gateway() -> None:
    async def test() -> None:
        async with gateway() as active, gateway(standby=True) as standby:
            body = {"engines": [{"engine": "one"}]}
            assert (await standby.put(f"{ROUTES}/prod", json=body)).status_code == 503
            assert (await active.put(f"{ROUTES}/prod", json=body)).status_code == 200
            while not (routes := (await standby.get(ROUTES)).json()["data"]):
                await asyncio.sleep(0.01)
            assert [route["name"] for route in routes] == ["prod"]

    run(test)


def test_no_request_fails_while_a_route_is_changed() -> None:
    async def test() -> None:
        async with gateway_with("one", "two") as client:

            async def point_to(name: str) -> None:
                assert (await client.put(f"{ROUTES}/prod", json={"engines": [{"engine": name}]})).status_code == 200

            await point_to("one")
            found: list[str] = []
            is_over = asyncio.Event()

            async def ask() -> None:
                while not is_over.is_set():
                    found.append(await answered_by(client))

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            for name in ("two", "one") * 10:
                await point_to(name)
                assert await answered_by(client) == name  # the change applies at once
            is_over.set()
            await asyncio.gather(*asking)
            assert set(found) == {"one", "two"}

    run(test)


def test_requests_are_split_by_weight_and_requests_of_one_user_or_key_go_to_one_engine() -> None:
    async def test() -> None:
        async with gateway_with("one", "two") as client:
            body = {"engines": [{"engine": "one", "weight": 3}, {"engine": "two", "weight": 1}]}
            await client.put(f"{ROUTES}/prod", json=body)
            by_chance = Counter([await answered_by(client) for _ in range(80)])
            assert by_chance["one"] > by_chance["two"] > 0
            users = {user: {await answered_by(client, user=user) for _ in range(5)} for user in map(str, range(20))}
            assert all(len(engines) == 1 for engines in users.values())
            assert set.union(*users.values()) == {"one", "two"}
            client.headers["Authorization"] = "Bearer key-of-a-client"
            assert len({await answered_by(client) for _ in range(20)}) == 1

    run(test)


def test_the_answer_names_the_fallback_engine_that_answered() -> None:
    async def test() -> None:
        async with gateway_with("base") as client:
            await client.put(f"{ROUTES}/prod", json={"engines": [{"engine": "stopped"}], "fallback": "base"})
            assert await answered_by(client) == "base"

    run(test)
