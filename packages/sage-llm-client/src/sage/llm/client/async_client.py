"""AsyncSageClient: the methods of SageClient for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

import httpx

from sage.common.errors import GatewayUnreachable
from sage.llm.client import answers, calls, streams
from sage.llm.client.calls import Call, Cursor, Order
from sage.llm.client.client import CONNECT_SECONDS, RECONNECT_SECONDS, STREAM_TIMEOUT
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


class AsyncSageClient:
    """Asyncio client of a gateway. Its methods raise the same errors as the methods of SageClient."""

    def __init__(self, base_url: str = "http://127.0.0.1:8889", api_key: str | None = None, timeout_seconds: float = 120):
        """timeout_seconds: maximum wait for an answer.

        Other limits apply to streams, starts, forks, resumes, removals and health checks.
        """
        self.base_url, self.api_key, self._timeout_seconds = base_url, api_key, timeout_seconds
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=calls.headers(api_key), timeout=timeout_seconds, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def start_engine(self, **request: Any) -> EngineView:
        """Start an engine and return it in the state `validating`.  request: the fields of StartRequest."""
        return await self._send(calls.start(request))

    async def page_engines(
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
        return await self._send(calls.page(limit, after, states, kinds, order))

    async def iter_engines(
        self, *, states: Collection[EngineState] = (), kinds: Collection[EngineKind] = (), order: Order = "asc"
    ) -> AsyncIterator[EngineView]:
        """Yield the engines of the given states and kinds (empty: all)."""
        after: str | None = None
        while True:
            page = await self.page_engines(limit=calls.PAGE_LIMIT, after=after, states=states, kinds=kinds, order=order)
            for engine in page.data:
                yield engine
            if not page.has_more:
                return
            after = page.last_id

    async def list_engines(
        self, *, states: Collection[EngineState] = (), kinds: Collection[EngineKind] = (), order: Order = "asc"
    ) -> list[EngineView]:
        """Return the engines of the given states and kinds (empty: all), oldest first unless `order` is `desc`."""
        return [engine async for engine in self.iter_engines(states=states, kinds=kinds, order=order)]

    async def get_engine(self, engine_id: str) -> EngineView:
        """Return one engine."""
        return await self._send(calls.get(engine_id))

    async def stop_engine(self, engine_id: str, *, force: bool = False) -> EngineView:
        """Request that an engine stops. This method does not wait until the engine stops. `force` kills the process."""
        return await self._send(calls.stop(engine_id, force=force))

    async def pause_engine(self, engine_id: str) -> EngineView:
        """Ask an engine to release its memory until the engine is resumed. A training run first saves a checkpoint."""
        return await self._send(calls.pause(engine_id))

    async def queue(self) -> list[EngineView]:
        """Return the waiting engines of the gateway's node, in the order of the queue."""
        return await self._send(calls.queue())

    async def move_engine(self, engine_id: str, position: int) -> EngineView:
        """Move a waiting engine to `position` in the queue (1: the front).

        An engine cannot move ahead of an engine with a higher priority, or behind an engine with a lower priority.
        """
        return await self._send(calls.move(engine_id, position))

    async def resume_engine(self, engine_id: str) -> EngineView:
        """Resume a stopped, failed or paused engine. A training run continues from its last checkpoint."""
        return await self._send(calls.resume(engine_id))

    async def checkpoint_engine(self, engine_id: str) -> EngineView:
        """Request a checkpoint of a training run after its current step.

        If the run was started with `serve`, an llm engine then serves this checkpoint.
        """
        return await self._send(calls.checkpoint(engine_id))

    async def change_training(self, engine_id: str, **options: Any) -> TrainingChangeView:
        """Change options of a training run from its next step on; options: the fields of TrainingChange."""
        return await self._send(calls.change_training(engine_id, options))

    async def fork_engine(self, engine_id: str, **request: Any) -> EngineView:
        """Start a training run that continues from a checkpoint of another run; request: the fields of ForkRequest."""
        return await self._send(calls.fork(engine_id, request))

    async def remove_engine(self, engine_id: str) -> None:
        """Delete a stopped, completed or failed engine with its log and its checkpoints."""
        await self._send(calls.remove(engine_id))

    async def get_logs(self, engine_id: str, tail: int = 100) -> list[str]:
        """Return the last lines of an engine's log."""
        return await self._send(calls.logs(engine_id, tail))

    async def follow_logs(self, engine_id: str, tail: int = 100, patience_seconds: float = 60) -> AsyncIterator[str]:
        """Yield the last lines of an engine's log, then each new line until the engine has ended.

        If the gateway restarts, each line is still yielded exactly once.
        patience_seconds: maximum time to wait while the gateway is unreachable.
        """
        reader = streams.LogReader()
        async for line in self._follow(lambda: calls.follow_logs(engine_id, tail, reader.offset), reader, patience_seconds):
            yield line

    async def get_events(self, engine_id: str) -> list[EngineEvent]:
        """Return the past events of one engine, oldest first."""
        reader = streams.EventReader()
        return [
            event async for event in self._follow(lambda: calls.events(engine_id, reader.cursor, follow=False), reader, 0)
        ]

    async def follow_events(self, engine_id: str, patience_seconds: float = 60) -> AsyncIterator[EngineEvent]:
        """Yield the past events of one engine, then each new event until the engine has ended."""
        reader = streams.EventReader()
        async for event in self._follow(
            lambda: calls.events(engine_id, reader.cursor, follow=True), reader, patience_seconds
        ):
            yield event

    async def changes(self, after: Cursor = 0, limit: int = 100) -> EventPage:
        """Return at most `limit` events of all engines, starting after the event with the id `after`.

        If `after` is "latest", the page has no events, and its `last_id` is the id of the newest event.
        """
        return await self._send(calls.changes(after, limit))

    async def follow_changes(self, after: Cursor = 0, patience_seconds: float = 60) -> AsyncIterator[EngineEvent]:
        """Yield the events of all engines after the event with the id `after`, then each new event.

        The iterator never ends. If `after` is "latest", the iterator yields only new events.
        """
        cursor = (await self.changes(after)).last_id if after == "latest" else after
        reader = streams.EventReader(cursor, endless=True)
        async for event in self._follow(lambda: calls.follow_changes(reader.cursor), reader, patience_seconds):
            yield event

    async def training_steps(self, engine_id: str, after: int = 0, max_points: int | None = None) -> list[TrainingStep]:
        """Return the optimizer steps of a training run after step `after`, downsampled to at most `max_points` steps."""
        return await self._send(calls.training_steps(engine_id, after, max_points))

    async def list_routes(self) -> list[RouteView]:
        """Return all routes. A route is a model name that stands for one or more engines."""
        return await self._send(calls.routes())

    async def get_route(self, name: str) -> RouteView:
        """Return one route."""
        return await self._send(calls.get_route(name))

    async def set_route(self, name: str, engines: Mapping[str, int], fallback: str | None = None) -> RouteView:
        """Create or replace a route.

        engines: the weight of each engine. The keys are ids, names or models of engines.
        fallback: id, name or model of the engine that answers if none of `engines` can answer.
        """
        return await self._send(calls.set_route(name, engines, fallback))

    async def remove_route(self, name: str) -> None:
        """Delete a route."""
        await self._send(calls.remove_route(name))

    async def devices(self) -> list[Device]:
        """Return the GPUs and the main memory of the gateway's node."""
        return await self._send(calls.devices())

    async def estimate(self, model: str, **request: Any) -> EstimateView:
        """Return the memory that an engine would need.  request: other fields of StartRequest."""
        return await self._send(calls.estimate({"model": model, **request}))

    async def test_webhooks(self) -> list[WebhookResult]:
        """Send a test message to each webhook of the gateway, and return the results."""
        return await self._send(calls.test_webhooks())

    async def backends(self) -> list[BackendView]:
        """Return the backends that the gateway knows, and whether each is installed."""
        return await self._send(calls.backends())

    async def health(self, timeout_seconds: float = 3) -> dict[str, Any]:
        """Return the gateway's version and PID."""
        return await self._send(calls.health(timeout_seconds))

    async def models(self) -> list[str]:
        """Return the model names that requests can use."""
        return await self._send(calls.models())

    async def chat(self, model: str, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the text of a model's answer.  options: other fields of the request."""
        return await self._send(calls.chat(model, messages, options))

    async def chat_stream(self, model: str, messages: list[dict[str, Any]], **options: Any) -> AsyncIterator[str]:
        """Yield the text of a model's answer in pieces.  options: other fields of the request."""
        reader = streams.ChatReader()
        async with self._stream(calls.chat(model, messages, {**options, "stream": True})) as response:
            async for chunk in response.aiter_bytes():
                for piece in reader.feed(chunk):
                    yield piece
            reader.finish()

    async def _send(self, call: Call[T]) -> T:
        seconds = call.timeout_seconds or self._timeout_seconds
        timeout = httpx.Timeout(min(seconds, CONNECT_SECONDS), read=seconds)
        try:
            response = await self._http.request(call.method, call.path, json=call.json, params=call.params, timeout=timeout)
        except httpx.HTTPError as error:
            raise answers.unreachable(self.base_url, error) from error
        return answers.read(response, call.read)

    @asynccontextmanager
    async def _stream(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream(
                call.method, call.path, json=call.json, params=call.params, timeout=STREAM_TIMEOUT
            ) as response:
                if response.is_error:
                    await response.aread()
                    answers.raise_for_error(response)
                yield response
        except httpx.HTTPError as error:
            raise answers.unreachable(self.base_url, error) from error

    async def _follow(
        self, call: Callable[[], Call[None]], reader: streams.StreamReader[T], patience_seconds: float
    ) -> AsyncIterator[T]:
        patience = streams.Patience(patience_seconds)
        while True:
            try:
                async with self._stream(call()) as response:
                    reader.begin(response.headers)
                    patience.reset()
                    async for chunk in response.aiter_bytes():
                        for item in reader.feed(chunk):
                            yield item
                for item in reader.finish():
                    yield item
                return
            except GatewayUnreachable:
                if patience.is_over(reader):
                    raise
                await asyncio.sleep(RECONNECT_SECONDS)
