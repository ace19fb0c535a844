"""Webhook messages that are not delivered yet.

A message is written in the transaction of the event that it announces. Therefore no message is lost if the gateway is
killed or if the engine is removed.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update

from sage.llm.client.types import EngineState
from sage.llm.control_plane.store.leases import LeaseStore
from sage.llm.control_plane.store.records import EngineRecord
from sage.llm.control_plane.store.tables import webhook_messages

#: States that webhook messages announce.
_ANNOUNCED = frozenset({EngineState.RUNNING, EngineState.PAUSED, EngineState.COMPLETED, EngineState.FAILED})


@dataclass(frozen=True)
class WebhookMessage:
    """A message for one endpoint."""

    event_id: int
    endpoint: str  #: hash of the URL
    node: str
    body: str  #: JSON; every attempt sends the same bytes
    attempts: int  #: number of failed attempts

    @property
    def id(self) -> str:
        """The header `webhook-id`, which is the same for every attempt."""
        return f"msg_{self.node}_{self.event_id}"


class OutboxStore(LeaseStore):
    """The methods of the store for webhook messages.

    These methods need no lease. If two gateways send the same message, both messages have the same id, and the receiver can
    ignore the second message.
    """

    endpoints: Collection[str] = ()  #: hashes of the URLs to which new messages are sent

    def messages(self, node: str, endpoint: str, *, limit: int) -> list[WebhookMessage]:
        """Return messages for an endpoint, sorted by the number of attempts.

        Messages with the same number of attempts are sorted from the oldest to the newest.
        """
        table = webhook_messages.c
        query = select(webhook_messages).where(table.node == node, table.endpoint == endpoint)
        with self._read() as connection:
            rows = connection.execute(query.order_by(table.attempts, table.event_id).limit(limit))
            return [WebhookMessage(**row._mapping) for row in rows]  # noqa: SLF001 - public in SQLAlchemy

    def count_attempt(self, message: WebhookMessage) -> None:
        """Record that an attempt to deliver a message failed."""
        with self._write() as connection:
            connection.execute(update(webhook_messages).where(_is(message)).values(attempts=message.attempts + 1))

    def remove_message(self, message: WebhookMessage) -> None:
        """Delete a message."""
        with self._write() as connection:
            connection.execute(delete(webhook_messages).where(_is(message)))

    def remove_other_endpoints(self, node: str) -> None:
        """Delete the messages of a node for endpoints that are not in `endpoints`."""
        table = webhook_messages.c
        with self._write() as connection:
            connection.execute(
                delete(webhook_messages).where(table.node == node, table.endpoint.not_in(list(self.endpoints)))
            )

    def _announce(self, connection: Connection, engine: EngineRecord) -> None:
        """Write one message for each endpoint if the new state of an engine is in `_ANNOUNCED`."""
        if not self.endpoints or engine.state not in _ANNOUNCED:
            return
        row = {"event_id": engine.last_event, "node": engine.node, "body": _body(engine), "attempts": 0}
        connection.execute(insert(webhook_messages), [row | {"endpoint": endpoint} for endpoint in self.endpoints])


def _body(engine: EngineRecord) -> str:
    content = {
        "type": f"engine.{engine.state}",
        "timestamp": engine.state_at.isoformat(),
        "data": {
            "id": engine.id, "kind": engine.kind, "name": engine.name, "model": engine.model, "state": engine.state,
            "reason": engine.reason.model_dump() if engine.reason else None, "restarts": engine.restarts,
            "metadata": dict(engine.metadata), "node": engine.node, "event_id": engine.last_event,
        },
    }  # fmt: skip
    return json.dumps(content)


def _is(message: WebhookMessage) -> ColumnElement[bool]:
    table = webhook_messages.c
    return and_(table.event_id == message.event_id, table.endpoint == message.endpoint)
