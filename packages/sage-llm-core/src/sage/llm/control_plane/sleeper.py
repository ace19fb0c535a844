"""Carry out the actions for sleeping servers. The module `sleeping.py` decides which servers sleep."""

import asyncio
import functools
import logging
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from sage.common.errors import EngineError, SageError
from sage.llm.client.types import EngineState
from sage.llm.control_plane.actions import Sleep, Wake
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.executors.sleep_client import SleepClient
from sage.llm.control_plane.idle import reason_of_stop
from sage.llm.control_plane.launchers.base import Launcher, Signal
from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.routing import RoutingTable
from sage.llm.control_plane.store.records import EngineRecord, Lease, ServerRecord, ServerState
from sage.llm.control_plane.store.store import StaleWrite, Store
from sage.llm.control_plane.writing import Writer

logger = logging.getLogger(__name__)


class Sleeper:
    """Lets servers sleep, wakes them, and ends sleeping servers."""

    def __init__(
        self, store: Store, pool: Pool, launcher: Launcher, routing: RoutingTable, held_lease: Callable[[], Lease]
    ) -> None:
        """pool: threads for calls of `store`; held_lease: returns the lease or raises LeaseLost."""
        self._store, self._pool, self._launcher, self._routing = store, pool, launcher, routing
        self._held_lease, self._write, self._client = held_lease, Writer(pool, held_lease), SleepClient()
        self._ending: dict[str, asyncio.Task[None]] = {}

    async def act(self, action: Sleep | Wake) -> None:
        """Carry out an action. Raises StaleWrite if the engine or the server was changed meanwhile.

        If this method raises OSError, the caller can retry the action.
        """
        match action:
            case Sleep(engine, server):
                await self._sleep(engine, server)
            case Wake(engine, server):
                await self._wake(engine, server)

    async def _sleep(self, engine: EngineRecord, server: ServerRecord) -> None:
        """Let a server sleep, and store that `engine`, the last engine of the server, is paused.

        If the server cannot sleep, it is marked as closing, so that the next plan stops its process.
        """
        lease = self._held_lease()
        if server.state is not ServerState.SLEEPING:
            state = ServerState.SLEEPING
            server = await self._pool.run(self._store.close_server, server, engine, lease=lease, state=state)
        try:
            await self._client.sleep(server)
        except EngineError as error:
            logger.warning("the server of engine %s cannot sleep, so it is stopped: %s", engine.id, error.message)
            await self._update(server, state=ServerState.CLOSING)
            return
        kept_bytes = registry.serving(server.backend).capabilities.asleep_bytes or 0
        await self._update(server, reserved_bytes=min(kept_bytes, server.reserved_bytes or 0))
        reason = reason_of_stop(engine)
        paused = await self._write(self._store.transition, engine, EngineState.PAUSED, reason=reason)
        self._routing.apply(paused, None)
        logger.info("engine %s is paused, and its server %s sleeps", engine.id, server.id)

    async def _wake(self, engine: EngineRecord, server: ServerRecord) -> None:
        """Wake a server. If the server cannot wake, kill its process, so that the next plan launches a new process."""
        self._held_lease()
        try:
            await self._client.wake(server)
        except EngineError as error:
            logger.warning("the server of engine %s cannot be woken, so it is started again: %s", engine.id, error.message)
            await self._launcher.signal(server.handle, Signal.KILL)
            return
        self._routing.apply(engine, await self._update(server, state=ServerState.LAUNCHED))

    def end(self, server: ServerRecord) -> None:
        """Kill the process of a sleeping server, or remove the server's row if the process has already exited.

        The caller repeats the call until the row is removed.
        """
        if server.id not in self._ending:
            task = self._ending[server.id] = asyncio.create_task(self._end(server))
            task.add_done_callback(lambda _: self._ending.pop(server.id))

    async def close(self) -> None:
        """Wait until all tasks that `end` has created are done."""
        await asyncio.gather(*self._ending.values())

    async def _end(self, server: ServerRecord) -> None:
        try:
            await self._kill_or_remove(server)
        except (SageError, OSError, SQLAlchemyError, StaleWrite) as error:
            logger.debug("the sleeping server %s cannot be ended now, retrying: %s", server.id, error)

    async def _kill_or_remove(self, server: ServerRecord) -> None:
        process = (await self._launcher.observe([server.handle])).get(server.handle)
        if process is None:
            return
        lease = self._held_lease()
        if process.alive or process.leftovers:
            await self._launcher.signal(server.handle, Signal.KILL)
        else:
            await self._pool.run(self._store.remove_server, server, lease=lease)

    async def _update(self, server: ServerRecord, **values: object) -> ServerRecord:
        update = functools.partial(self._store.update_server, server, lease=self._held_lease(), **values)
        return await self._pool.run(update)
