"""LeaseKeeper: acquires and renews the lease of a node, independently of the other work of the control plane.

A lease is the right to write the rows of a node in the database. If a node has several control planes, only one holds the
lease. The others are on standby: they try regularly to acquire the lease.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.exc import SQLAlchemyError

from sage.common.identity import ProcessIdentity
from sage.llm.control_plane.store.clock import uptime_seconds
from sage.llm.control_plane.store.leases import LeaseStore
from sage.llm.control_plane.store.records import Lease

logger = logging.getLogger(__name__)
#: Fractions of the lease time. _RENEW: interval between renewals. _LOOK: interval between a standby's attempts to acquire
#: the lease. _USE: time after a renewal for which the holder uses the lease.
_RENEW, _LOOK, _USE = 1 / 4, 1 / 8, 7 / 8


class LeaseKeeper:
    """Acquires and renews the lease of a node."""

    def __init__(
        self, store: LeaseStore, node: str, url: str, on_change: Callable[[Lease | None], None] = lambda _: None
    ) -> None:
        """url: URL of this control plane's gateway.  on_change: called in the event loop with the new `lease`."""
        self.holder = secrets.token_hex(8)
        self.on_change = on_change
        self._store, self._node, self._url = store, node, url
        self._held: Lease | None = None
        self._reported: Lease | None = None
        self._renewed_seconds = 0.0
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "lease")  # a separate thread, so that no other work delays a renewal

    @property
    def lease(self) -> Lease | None:
        """The lease, or None if this control plane does not hold the lease.

        The value is also None if the last renewal is too long ago, for example because the machine was suspended.
        """
        is_fresh = uptime_seconds() - self._renewed_seconds < _USE * self._store.lease_seconds
        return self._held if is_fresh else None

    async def open(self) -> None:
        """Register the node and try to acquire the lease. Until `close`, a task tries to renew or acquire the lease."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._store.register_node, self._node, socket.gethostname())
        await self._step()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop the task and release the lease."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._held:
            with contextlib.suppress(SQLAlchemyError):  # the thread first completes a renewal in progress
                await asyncio.get_running_loop().run_in_executor(self._thread, self._store.release_lease, self._held)
            self._held = None
        self._thread.shutdown(wait=False)
        self._report()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep((_RENEW if self._held else _LOOK) * self._store.lease_seconds)
            await self._step()

    async def _step(self) -> None:
        began_seconds = uptime_seconds()
        try:
            self._held = await asyncio.get_running_loop().run_in_executor(self._thread, self._renew_or_acquire, self._held)
            self._renewed_seconds, self._trouble = began_seconds, ""
        except Exception as error:
            if repr(error) != self._trouble:
                logger.warning("the lease of this node cannot be renewed, retrying", exc_info=error)
            self._trouble = repr(error)
        self._report()

    def _renew_or_acquire(self, held: Lease | None) -> Lease | None:
        if held and self._store.renew_lease(held, self.holder):
            return held
        me = ProcessIdentity.of(os.getpid())
        return self._store.acquire_lease(self._node, self.holder, socket.gethostname(), me, self._url)

    def _report(self) -> None:
        lease = self.lease
        if lease != self._reported:
            self._reported = lease
            self.on_change(lease)
