"""From the model that a request names to the engine that answers it."""

import asyncio
import time

from sage.common.errors import NotFound, Overloaded
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.states import EngineState
from sage.llm.control_plane.store.store import EngineRecord
from sage.llm.control_plane.types import EngineKind

_POLL_SECONDS = 0.1


async def running_engine(manager: ControlPlaneManager, model: str, kind: EngineKind, wait_seconds: float) -> EngineRecord:
    """Return the running engine for a model, waiting for one that is starting.

    Raises NotFound where none serves it, Overloaded where it is not ready in time or ends while it is waited for.
    """
    deadline = time.monotonic() + wait_seconds
    engine = await manager.find_engine(model, kind)
    while engine.state is not EngineState.RUNNING:
        if time.monotonic() > deadline:
            raise Overloaded(code="engine_starting", message=f"{engine.id} for '{model}' is still {engine.state}.",
                             hint="Try again in some seconds.")  # fmt: skip
        await asyncio.sleep(_POLL_SECONDS)
        try:
            engine = await manager.find_engine(engine.id, kind)
        except NotFound:
            ended = await manager.get_engine(engine.id)
            why = f": {ended.reason.message}" if ended.reason else ""
            raise Overloaded(code="engine_ended", message=f"{ended.id} for '{model}' is {ended.state}{why}",
                             hint=f"`sage llm engine resume {ended.id}` starts it again.") from None  # fmt: skip
    return engine
