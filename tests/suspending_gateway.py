"""Run a gateway that suspends itself once during a write. Usage: `python tests/suspending_gateway.py LEASE_SECONDS POINT`.

The write is the creation or a transition of the second engine. POINT selects when the gateway suspends itself.
`add`, `transition`: after the data for the write was read, and before the transaction begins.
`commit`: inside the transaction, after the lease was checked.  `never`: no suspension.
"""

import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sage.llm.client.types import EngineState, EventKind
from sage.llm.control_plane.store.leases import LeaseStore
from sage.llm.control_plane.store.store import Store
from sage.llm.gateway.main import main

_created = itertools.count(1)


def _is_second(_connection: Any, _engine_id: str, kind: EventKind, *_: Any, **__: Any) -> bool:
    return kind is EventKind.CREATED and next(_created) == 2


#: For each POINT: the method of Store at whose start the process is suspended, and a function that selects the call.
_POINTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "add": ("add", lambda record, *_, **__: record.name == "second"),
    "transition": ("transition", lambda record, state, **_: record.name == "second" and state is EngineState.STARTING),
    "commit": ("_event", _is_second),
}


def _suspend_once(point: str) -> None:
    name, is_meant = _POINTS[point]
    original: Any = inspect.getattr_static(Store, name)
    is_static = isinstance(original, staticmethod)

    def suspending(*arguments: Any, **values: Any) -> Any:
        if is_meant(*(arguments if is_static else arguments[1:]), **values):
            setattr(Store, name, original)
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments, **values)

    setattr(Store, name, staticmethod(suspending) if is_static else suspending)


if __name__ == "__main__":
    lease_seconds, point = float(sys.argv.pop(1)), sys.argv.pop(1)
    LeaseStore.__init__.__defaults__ = (lease_seconds,)
    if point != "never":
        _suspend_once(point)
    sys.exit(main())
