"""SageClient: the gateway's HTTP interface as methods. AsyncSageClient has the same methods for asyncio."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx

from sage.common.errors import GatewayUnreachable
from sage.llm.client import answers, calls, streams
from sage.llm.client.calls import Call, Cursor, Order
from sage.llm.client.run_types import TrainingChangeView
from sage.llm.client.types import (
    BackendView,
    Device,
    EngineEvent,
    EngineKind,
    EnginePage,
    EngineState,
    EngineView,
    EstimateView,
    EventPage,
    RouteView,
    TrainingStep,
    WebhookResult,
)

T = TypeVar("T")
#: Maximum seconds to open a connection.
CONNECT_SECONDS = 10.0
#: Time limits of a stream. Reading has no limit, because an engine can run for a long time without new output.
STREAM_TIMEOUT = httpx.Timeout(CONNECT_SECONDS, read=None)
#: Seconds to wait before a broken stream is requested again.
RECONNECT_SECONDS = 0.3


class SageClient:
    """Client of a gateway.

    Each method raises the SageError that the gateway reports, or GatewayUnreachable if no gateway answers.
    """

    def __init__(self, base_url: str = "http://127.0.0.1:8889", api_key: str | None = None, timeout_seconds: float = 120):
        """timeout_seconds: maximum wait for an answer.

        Other limits apply to streams, starts, forks, resumes, removals and health checks.
        """
        self.base_url, self.api_key, self._timeout_seconds = base_url, api_key, timeout_seconds
        self._http = httpx.Client(
            base_url=base_url, headers=calls.headers(api_key), timeout=timeout_seconds, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def start_engine(self, **request: Any) -> EngineView:
        """Start an engine and return it in the state `validating`.  request: the fields of StartRequest."""
        return self._send(calls.start(request))

    def page_engines(
        self,
        *,
        limit: int = 100,
        after: str | None = None,
        states: Collection[EngineState] = (),
        kinds: Collection[EngineKind] = (),
        order: Order = "asc",
    ) -> EnginePage:
        """Return one page of the list of engines.

        after: `last_id` of the previous page.
        states, kinds: the states and kinds of the engines to return (empty: all).
        """
        return self._send(calls.page(limit, after, states, kinds, order))

    def iter_engines(
        self, *, states: Collection[EngineState] = (), kinds: Collection[EngineKind] = (), order: Order = "asc"
    ) -> Iterator[EngineView]:
        """Yield the engines of the given states and kinds (empty: all)."""
        after: str | None = None
        while True:
            page = self.page_engines(limit=calls.PAGE_LIMIT, after=after, states=states, kinds=kinds, order=order)
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id

    def list_engines(
        self, *, states: Collection[EngineState] = (), kinds: Collection[EngineKind] = (), order: Order = "asc"
    ) -> list[EngineView]:
        """Return the engines of the given states and kinds (empty: all), oldest first unless `order` is `desc`."""
        return list(self.iter_engines(states=states, kinds=kinds, order=order))

    def get_engine(self, engine_id: str) -> EngineView:
        """Return one engine."""
        return self._send(calls.get(engine_id))

    def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Request that an engine stops. This method does not wait until the engine stops. `force` kills the process."""
        return self._send(calls.stop(engine_id, force=force))

    def pause_engine(self, engine_id: str) -> EngineView:
        """Ask an engine to release its memory until the engine is resumed. A training run first saves a checkpoint."""
        return self._send(calls.pause(engine_id))

    def queue(self) -> list[EngineView]:
        """Return the waiting engines of the gateway's node, in the order of the queue."""
        return self._send(calls.queue())

    def move_engine(self, engine_id: str, position: int) -> EngineView:
        """Move a waiting engine to `position` in the queue (1: the front). The engine's priority can limit the move."""
        return self._send(calls.move(engine_id, position))

    def resume_engine(self, engine_id: str) -> EngineView:
        """Resume a stopped, failed or paused engine. A training run continues from its last checkpoint."""
        return self._send(calls.resume(engine_id))

    def checkpoint_engine(self, engine_id: str) -> EngineView:
        """Request a checkpoint of a training run after its current step.

        If the run was started with `serve`, an llm engine then serves this checkpoint.
        """
        return self._send(calls.checkpoint(engine_id))

    def change_training(self, engine_id: str, **options: Any) -> TrainingChangeView:
        """Change options of a training run from its next step on; options: the fields of TrainingChange."""
        return self._send(calls.change_training(engine_id, options))

    def fork_engine(self, engine_id: str, **request: Any) -> EngineView:
        """Start a training run that continues from a checkpoint of another run; request: the fields of ForkRequest."""
        return self._send(calls.fork(engine_id, request))

    def remove_engine(self, engine_id: str) -> None:
        """Delete a stopped, completed or failed engine with its log and its checkpoints."""
        self._send(calls.remove(engine_id))

    def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        return self._send(calls.logs(engine_id, tail))

    def follow_logs(self, engine_id: str, tail: int = 100, patience_seconds: float = 60) -> Iterator[str]:
        """Yield the last lines of an engine's log, then each new line until the engine has ended.

        If the gateway restarts, each line is still yielded exactly once.
        patience_seconds: maximum time to wait while the gateway is unreachable.
        """
        reader = streams.LogReader()
        yield from self._follow(lambda: calls.follow_logs(engine_id, tail, reader.offset), reader, patience_seconds)

    def get_events(self, engine_id: str) -> list[EngineEvent]:
        """Return the past events of one engine, oldest first."""
        reader = streams.EventReader()
        return list(self._follow(lambda: calls.events(engine_id, reader.cursor, follow=False), reader, 0))

    def follow_events(self, engine_id: str, patience_seconds: float = 60) -> Iterator[EngineEvent]:
        """Yield the past events of one engine, then each new event until the engine has ended."""
        reader = streams.EventReader()
        yield from self._follow(lambda: calls.events(engine_id, reader.cursor, follow=True), reader, patience_seconds)

    def changes(self, after: Cursor = 0, limit: int = 100) -> EventPage:
        """Return at most `limit` events of all engines, starting after the event with the id `after`.

        If `after` is "latest", the page has no events, and its `last_id` is the id of the newest event.
        """
        return self._send(calls.changes(after, limit))

    def follow_changes(self, after: Cursor = 0, patience_seconds: float = 60) -> Iterator[EngineEvent]:
        """Yield the events of all engines after the event with the id `after`, then each new event.

        The iterator never ends. If `after` is "latest", the iterator yields only new events.
        """
        cursor = self.changes(after).last_id if after == "latest" else after
        reader = streams.EventReader(cursor, endless=True)
        yield from self._follow(lambda: calls.follow_changes(reader.cursor), reader, patience_seconds)

    def training_steps(self, engine_id: str, after: int = 0, max_points: int | None = None) -> list[TrainingStep]:
        """Return the optimizer steps of a training run after step `after`, downsampled to at most `max_points` steps."""
        return self._send(calls.training_steps(engine_id, after, max_points))

    def list_routes(self) -> list[RouteView]:
        """Return all routes. A route is a model name that stands for one or more engines."""
        return self._send(calls.routes())

    def get_route(self, name: str) -> RouteView:
        """Return one route."""
        return self._send(calls.get_route(name))

    def set_route(self, name: str, engines: Mapping[str, int], fallback: str | None = None) -> RouteView:
        """Create or replace a route.

        engines: the weight of each engine. The keys are ids, names or models of engines.
        fallback: id, name or model of the engine that answers if none of `engines` can answer.
        """
        return self._send(calls.set_route(name, engines, fallback))

    def remove_route(self, name: str) -> None:
        """Delete a route."""
        self._send(calls.remove_route(name))

    def devices(self) -> list[Device]:
        """Return the GPUs and the main memory of the gateway's node."""
        return self._send(calls.devices())

    def estimate(self, model: str, **request: Any) -> EstimateView:
        """Return the memory that an engine would need.  request: the same fields as for `start_engine`."""
        return self._send(calls.estimate({"model": model, **request}))

    def test_webhooks(self) -> list[WebhookResult]:
        """Send a test message to each webhook of the gateway, and return the results."""
        return self._send(calls.test_webhooks())

    def backends(self) -> list[BackendView]:
        """Return the backends that the gateway knows, and whether each is installed."""
        return self._send(calls.backends())

    def health(self, timeout_seconds: float = 3) -> dict[str, Any]:
        """Return the gateway's version and PID."""
        return self._send(calls.health(timeout_seconds))

    def models(self) -> list[str]:
        """Return the model names that requests can use."""
        return self._send(calls.models())

    def chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the text of a model's answer.  options: other fields of the request."""
        return self._send(calls.chat(model, messages, options))

    def chat_stream(self, model: str, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]:
        """Yield the text of a model's answer in pieces.  options: other fields of the request."""
        reader = streams.ChatReader()
        with self._stream(calls.chat(model, messages, {**options, "stream": True})) as response:
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
            reader.finish()

    def _send(self, call: Call[T]) -> T:
        seconds = call.timeout_seconds or self._timeout_seconds
        timeout = httpx.Timeout(min(seconds, CONNECT_SECONDS), read=seconds)
        try:
            response = self._http.request(call.method, call.path, json=call.json, params=call.params, timeout=timeout)
        except httpx.HTTPError as error:
            raise answers.unreachable(self.base_url, error) from error
        return answers.read(response, call.read)

    @contextmanager
    def _stream(self, call: Call[Any]) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(
                call.method, call.path, json=call.json, params=call.params, timeout=STREAM_TIMEOUT
            ) as response:
                if response.is_error:
                    response.read()
                    answers.raise_for_error(response)
                yield response
        except httpx.HTTPError as error:
            raise answers.unreachable(self.base_url, error) from error

    def _follow(
        self, call: Callable[[], Call[None]], reader: streams.StreamReader[T], patience_seconds: float
    ) -> Iterator[T]:
        patience = streams.Patience(patience_seconds)
        while True:
            try:
                with self._stream(call()) as response:
                    reader.begin(response.headers)
                    patience.reset()
                    for chunk in response.iter_bytes():
                        for item in reader.feed(chunk):
                            yield item
                for item in reader.finish():
                    yield item
                return
            except GatewayUnreachable:
                if patience.is_over(reader):
                    raise
                time.sleep(RECONNECT_SECONDS)
