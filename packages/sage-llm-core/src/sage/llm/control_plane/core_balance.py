"""Give the CPU cores of idle servers to active servers, while the servers run."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from sage.llm.control_plane.cores import Cores, cpu_servers, new_threads
from sage.llm.control_plane.executors.base import Observed
from sage.llm.control_plane.store.records import EngineRecord, ServerRecord

logger = logging.getLogger(__name__)


class CoreBalancer:
    """Changes the number of threads of running servers that support this change."""

    def __init__(self, cores: Cores, set_threads: Callable[[ServerRecord, int], Awaitable[None]]) -> None:
        """set_threads: changes the number of threads of a server, or raises OSError."""
        self._cores, self._set_threads = cores, set_threads
        self._changes: dict[str, asyncio.Task[None]] = {}

    def balance(
        self, engines: Iterable[EngineRecord], servers: Mapping[str, ServerRecord], observed: Mapping[str, Observed]
    ) -> None:
        """Start to change the threads of servers whose share of the cores has changed."""
        changed = new_threads(self._cores.count, cpu_servers(engines, servers, observed, self._cores))
        for server_id in changed.keys() - self._changes.keys():
            task = asyncio.create_task(self._change(servers[server_id], changed[server_id]))
            self._changes[server_id] = task
            task.add_done_callback(functools.partial(self._forget, server_id))

    async def close(self) -> None:
        """Cancel the changes in progress."""
        changes = list(self._changes.values())
        for change in changes:
            change.cancel()
        await asyncio.gather(*changes, return_exceptions=True)

    async def _change(self, server: ServerRecord, threads: int) -> None:
        try:
            await self._set_threads(server, threads)
        except OSError as error:  # the next call of `balance` tries again
            logger.debug("%s", error)

    def _forget(self, server_id: str, _: asyncio.Task[None]) -> None:
        del self._changes[server_id]
