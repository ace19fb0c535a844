"""Record the requests to engines that are unloaded when idle."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable

from sage.llm.client.types import EngineState
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import Route, RoutingTable
from sage.llm.control_plane.store.store import Store

logger = logging.getLogger(__name__)
#: Minimum time between two recorded requests to the same engine: either `_TOUCH_SECONDS`, or the share `_TOUCH_SHARE` of the
#: engine's `idle_stop_minutes`. The shorter of these two times is used.
_TOUCH_SECONDS, _TOUCH_SHARE = 10.0, 0.25
_CHECK_SECONDS = 1.0
_LOADED_OR_PAUSED = (EngineState.RUNNING, EngineState.STOPPING, EngineState.PAUSED)


class Activity:
    """Records the requests of this gateway to engines for which `idle_stop_minutes` is set."""

    def __init__(self, store: Store, pool: Pool, routing: RoutingTable, on_paused: Callable[[], None]) -> None:
        """on_paused: called if the engine of a recorded request is not running."""
        self._store, self._pool, self._routing, self._on_paused = store, pool, routing, on_paused
        self.in_progress: Counter[str] = Counter()  #: numbers of requests in progress, by engine id; set by the gateway
        self._touched_seconds: dict[str, float] = {}
        self._waking: dict[str, asyncio.Task[bool]] = {}

    async def may_use(self, route: Route) -> bool:
        """Return whether a request can be sent to an engine now.

        If `idle_stop_minutes` is set, also record the request in the database, unless another request was recorded recently.
        """
        if route.idle_stop_minutes is None or route.state not in _LOADED_OR_PAUSED or not self._is_due(route):
            return route.state is EngineState.RUNNING
        return await self._touch(route)

    def wake(self, engine_id: str) -> None:
        """Record a request in the background, so that a paused engine is loaded again."""
        route = self._routing.get(engine_id)
        if route and route.idle_stop_minutes is not None and engine_id not in self._waking and self._is_due(route):
            self._waking[engine_id] = task = asyncio.create_task(self._touch(route))
            task.add_done_callback(lambda _: self._waking.pop(engine_id, None))

    async def run(self) -> None:
        """Record regularly, until cancelled, which engines have requests in progress."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            for engine_id in list(self.in_progress):
                route = self._routing.get(engine_id)
                if route and route.idle_stop_minutes is not None and self._is_due(route):
                    await self._touch(route)
            oldest_seconds = time.monotonic() - _TOUCH_SECONDS
            self._touched_seconds = {name: at for name, at in self._touched_seconds.items() if at >= oldest_seconds}

    def _is_due(self, route: Route) -> bool:
        after_seconds = min(_TOUCH_SECONDS, _TOUCH_SHARE * 60 * (route.idle_stop_minutes or 0))
        return time.monotonic() - self._touched_seconds.get(route.engine_id, -math.inf) >= after_seconds

    async def _touch(self, route: Route) -> bool:
        """Store the time of a request. Return whether the engine is running and has not changed since the route was read."""
        at_seconds = time.monotonic()
        try:
            engine = await self._pool.run(self._store.touch, route.engine_id)
        except Exception as error:  # noqa: BLE001 - logged
            logger.warning("the time of a request to %s cannot be stored: %r", route.engine_id, error)
            return route.state is EngineState.RUNNING
        self._touched_seconds[route.engine_id] = at_seconds
        if engine.state is EngineState.RUNNING:
            return route.last_event == engine.last_event
        self._routing.apply(engine, None)
        self._on_paused()
        return False
