"""Webhooks, sent to real HTTP servers on loopback."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from engines import record
from gateways import gateway, until
from http_servers import listening
from pydantic import SecretStr
from store_promises import lease_of
from support import free_port

from sage.common.errors import ConfigError
from sage.common.settings import Settings, load_settings
from sage.llm.client.types import EngineState
from sage.llm.control_plane import webhooks
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.store.database import open_database
from sage.llm.control_plane.store.store import Store
from sage.llm.control_plane.webhooks import Webhooks

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLjSw"


class Endpoint:
    """An HTTP server that records messages. It answers with the given statuses in order, and then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.received: list[tuple[dict[str, str], str]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/hooks/hunter2"

    async def _answer(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.text()))
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Endpoint"]:
        app = web.Application()
        app.router.add_post("/hooks/hunter2", self._answer)
        async with listening(app, self.port):
            yield self

    @property
    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.received]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextlib.asynccontextmanager
async def delivering(
    *endpoints: Endpoint, is_active: Callable[[], bool] = lambda: True, delays: tuple[float, ...] = (0.01, 0.01)
) -> AsyncIterator[Store]:
    """Deliver messages to endpoints, and yield the store."""
    settings = Settings(webhook_urls=tuple(endpoint.url for endpoint in endpoints), webhook_secret=SECRET)
    store, pool = Store(open_database(load_settings().store_url)), Pool("store", 2)
    sender = Webhooks(store, pool, "n", settings, is_active, delays)
    task = asyncio.create_task(sender.run())
    try:
        yield store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sender.close()
        pool.close()


def complete(store: Store, engine_id: str = "engine-a") -> None:
    lease = lease_of(store)
    engine = store.add(record(EngineState.RUNNING, id=engine_id), "user", lease)
    store.transition(engine, EngineState.COMPLETED, actor="r", lease=lease)
    store.release_lease(lease)


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def pending(store: Store) -> int:
    return sum(len(store.messages("n", endpoint, limit=9)) for endpoint in store.endpoints)


def test_a_message_is_signed_and_sent_once() -> None:
    async def main() -> None:
        async with Endpoint().open() as endpoint, delivering(endpoint) as store:
            complete(store)
            await until(lambda: not pending(store), "the delivery")
            [(headers, body)] = endpoint.received
            content = webhooks.Webhook(SECRET).verify(body, headers)
            assert (content["type"], content["data"]["id"]) == ("engine.completed", "engine-a")
            assert headers["Content-Type"] == "application/json"

    run(main())


def test_a_message_is_sent_again_until_it_is_accepted_and_other_urls_do_not_wait() -> None:
    async def main() -> None:
        async with Endpoint(500, 302).open() as failing, Endpoint().open() as other, delivering(failing, other) as store:
            complete(store)
            await until(lambda: not pending(store), "the delivery")
            assert (len(failing.received), len(other.received)) == (3, 1)
            assert len({headers["webhook-id"] for headers, _ in failing.received + other.received}) == 1
            assert len({body for _, body in failing.received}) == 1

    run(main())


def test_a_message_is_sent_after_a_restart_even_if_its_engine_was_removed() -> None:
    endpoint = Endpoint()

    async def main() -> None:
        async with delivering(endpoint, delays=(3600,)) as store:  # no server listens
            complete(store)
            await until(lambda: sum(m.attempts for m in store.messages("n", *store.endpoints, limit=9)) > 0, "a failure")
            lease = lease_of(store)
            store.remove(store.get("engine-a"), actor="user", lease=lease)
            store.release_lease(lease)
        async with endpoint.open(), delivering(endpoint, delays=(3600,)) as store:
            await until(lambda: not pending(store), "the delivery")
        assert endpoint.types == ["engine.completed"]

    run(main())


def test_a_message_is_given_up_after_the_last_attempt_and_no_log_has_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        async with Endpoint(500, 500, 500).open() as endpoint, delivering(endpoint) as store:
            complete(store)
            await until(lambda: not pending(store), "the end of the attempts")
            assert len(endpoint.received) == 3

    run(main())
    levels = [entry.levelname for entry in caplog.records if entry.name == webhooks.__name__]
    assert levels == ["WARNING", "WARNING", "ERROR"]
    assert "to host 127.0.0.1 failed 3 times, giving up: the endpoint answered with status 500" in caplog.text
    assert "hunter2" not in caplog.text
    assert SECRET not in caplog.text


def test_deliveries_continue_after_an_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Endpoint().open() as endpoint, delivering(endpoint) as store:
            errors, messages = [KeyError("bug"), AttributeError("bug")], store.messages

            def read(*arguments: Any, **options: Any) -> Any:
                if errors:
                    raise errors.pop()
                return messages(*arguments, **options)

            monkeypatch.setattr(store, "messages", read)
            complete(store)
            await until(lambda: endpoint.types == ["engine.completed"], "the delivery")

    run(main())


def test_a_standby_delivers_nothing_until_it_is_active() -> None:
    is_active, asked = False, 0

    def role() -> bool:
        nonlocal asked
        asked += 1
        return is_active

    async def main() -> None:
        nonlocal is_active
        async with Endpoint().open() as endpoint, delivering(endpoint, is_active=role) as store:
            complete(store)
            rounds = asked
            await until(lambda: asked >= rounds + 3, "three rounds")
            assert (endpoint.received, pending(store)) == ([], 1)
            is_active = True
            await until(lambda: not pending(store), "the delivery")

    run(main())


def test_a_test_message_goes_to_each_url_at_once_and_its_result_is_returned() -> None:
    async def main() -> None:
        async with Endpoint().open() as endpoint, Endpoint(401).open() as refusing:
            urls = (endpoint.url, refusing.url)
            async with gateway(webhook_urls=urls, webhook_secret=SecretStr(SECRET)) as client:
                results = (await client.post("/v1/management/webhooks/test")).json()["data"]
            problem = "the endpoint answered with status 401"
            assert [(result["host"], result["problem"]) for result in results] == [
                ("127.0.0.1", None),
                ("127.0.0.1", problem),
            ]
            assert endpoint.types == refusing.types == ["webhook.test"]

    run(main())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"webhook_urls": "https://a.example/hunter2"}, "webhook_secret must be set too"),
        ({"webhook_urls": "ftp://a.example/hunter2", "webhook_secret": SECRET}, "must be URLs that begin with http"),
        ({"webhook_secret": "hunter2"}, "must be 24 to 64 bytes in base64"),
    ],
)
def test_invalid_settings_are_refused_without_their_values(
    values: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"SAGE_{name.upper()}", value)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_several_urls_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_WEBHOOK_URLS", "https://a.example/x, https://b.example/y,https://a.example/x,")
    monkeypatch.setenv("SAGE_WEBHOOK_SECRET", SECRET)
    settings = load_settings()
    assert settings.webhook_urls == ("https://a.example/x", "https://b.example/y")
    assert "a.example" not in repr(settings)
    assert SECRET not in repr(settings)
