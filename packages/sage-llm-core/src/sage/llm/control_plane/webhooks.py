"""Deliver webhook messages, in the format of Standard Webhooks (https://www.standardwebhooks.com, specification 1.0.0).

A message is sent repeatedly until the endpoint answers with a status of 2xx, or until no attempt is left. Until then, the
message stays in the database, so that no message is lost if the gateway restarts. An endpoint can receive a message more
than once; the header `webhook-id` is the same each time.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from urllib.parse import urlsplit

import httpx
from standardwebhooks.webhooks import Webhook

from sage.common.settings import Settings
from sage.llm.client.types import WebhookResult
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.store.outbox import WebhookMessage
from sage.llm.control_plane.store.store import Store

logger = logging.getLogger(__name__)
#: Waiting times after the first, second, … failed attempt. Source: section "Deliverability" of the specification.
_DELAYS_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
#: Maximum duration of an attempt. The specification recommends 15 to 30 s.
_ATTEMPT_SECONDS = 15.0
_POLL_SECONDS = 1.0
_MESSAGES_AT_ONCE = 100


class Webhooks:
    """Sends the messages of this node to the URLs in the settings. Each URL has its own task."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        node: str,
        settings: Settings,
        is_active: Callable[[], bool],
        delays_seconds: Sequence[float] = _DELAYS_SECONDS,
    ) -> None:
        """Configure `store` to write messages for the URLs.  is_active: whether this control plane delivers messages now."""
        self._store, self._pool, self._node, self._is_active = store, pool, node, is_active
        self._delays_seconds = delays_seconds
        self._urls = {_endpoint(url): url for url in settings.webhook_urls}
        store.endpoints = tuple(self._urls)
        secret = settings.webhook_secret
        self._signer = Webhook(secret.get_secret_value()) if secret and self._urls else None
        self._http = httpx.AsyncClient(headers={"User-Agent": f"SAGE/{version('sage-llm-core')}"})

    async def run(self) -> None:
        """Deliver messages until cancelled."""
        if self._urls:
            async with asyncio.TaskGroup() as tasks:
                for endpoint in self._urls:
                    tasks.create_task(self._deliver_all(endpoint))

    async def test(self) -> list[WebhookResult]:
        """Send a test message to all URLs at the same time, and return the results."""
        body = json.dumps({"type": "webhook.test", "timestamp": datetime.now(UTC).isoformat(), "data": {}})
        messages = [WebhookMessage(time.time_ns(), endpoint, self._node, body, 0) for endpoint in self._urls]
        problems = await asyncio.gather(*map(self._send, messages))
        return [
            WebhookResult(host=_host(url), problem=problem)
            for url, problem in zip(self._urls.values(), problems, strict=True)
        ]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _deliver_all(self, endpoint: str) -> None:
        # Keys: event ids. Values: times of the next attempts. After a restart, all messages are due.
        due_seconds: dict[int, float] = {}
        was_active = False
        while True:
            if self._is_active():
                try:
                    if not was_active:
                        await self._pool.run(self._store.remove_other_endpoints, self._node)
                        was_active = True
                    await self._round(endpoint, due_seconds)
                except Exception as error:  # noqa: BLE001 - logged, and tried again
                    logger.warning("webhook messages cannot be read or updated, retrying: %s", error)
            await asyncio.sleep(_POLL_SECONDS)

    async def _round(self, endpoint: str, due_seconds: dict[int, float]) -> None:
        """Send the messages that are due, one after another."""
        messages = await self._pool.run(self._store.messages, self._node, endpoint, limit=_MESSAGES_AT_ONCE)
        for message in messages:
            if due_seconds.get(message.event_id, 0.0) > time.monotonic():
                continue
            due_seconds.pop(message.event_id, None)
            delay_seconds = await self._deliver(message)
            if delay_seconds is not None:
                due_seconds[message.event_id] = time.monotonic() + delay_seconds

    async def _deliver(self, message: WebhookMessage) -> float | None:
        """Send a message, and return the seconds until the next attempt, or None if there is no further attempt."""
        problem = await self._send(message)
        host = _host(self._urls[message.endpoint])
        if problem and message.attempts < len(self._delays_seconds):
            delay_seconds = self._delays_seconds[message.attempts]
            logger.warning(
                "webhook message %s to host %s failed, retry in %g s: %s", message.id, host, delay_seconds, problem
            )
            await self._pool.run(self._store.count_attempt, message)
            return delay_seconds
        if problem:
            logger.error(
                "webhook message %s to host %s failed %d times, giving up: %s",
                message.id,
                host,
                message.attempts + 1,
                problem,
            )
        await self._pool.run(self._store.remove_message, message)
        return None

    async def _send(self, message: WebhookMessage) -> str | None:
        """Send a message once. Return None after success, else the reason of the failure. The reason contains no secrets."""
        assert self._signer
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(message.id, now, message.body),
        }
        try:
            async with (
                asyncio.timeout(_ATTEMPT_SECONDS),
                self._http.stream("POST", self._urls[message.endpoint], content=message.body, headers=headers) as answer,
            ):
                return None if answer.is_success else f"the endpoint answered with status {answer.status_code}"
        except TimeoutError:
            return f"the endpoint did not answer within {_ATTEMPT_SECONDS:g} s"
        except Exception as error:  # noqa: BLE001 - for example, httpx.InvalidURL is not an HTTPError
            return type(error).__name__  # the text of the error can contain the URL


def _endpoint(url: str) -> str:
    """Return a URL's identifier in the database. The identifier is a hash, because a URL's path can contain a secret."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
