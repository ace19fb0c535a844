"""The reconciler's access to the write methods of the store."""

import functools
from collections.abc import Callable
from typing import Any

from sage.llm.control_plane.pools import Pool
from sage.llm.control_plane.store.records import Lease

ACTOR = "reconciler"


class Writer:
    """Calls the write methods of the store with the lease that this control plane holds."""

    def __init__(self, pool: Pool, held_lease: Callable[[], Lease]) -> None:
        """pool: the threads that call the store.  held_lease: returns the lease, or raises LeaseLost."""
        self._pool, self._held_lease = pool, held_lease

    async def __call__(self, write: Callable[..., Any], *args: object, **values: object) -> Any:
        """Call `write` in the pool, and return the result."""
        return await self._pool.run(functools.partial(write, *args, actor=ACTOR, lease=self._held_lease(), **values))
