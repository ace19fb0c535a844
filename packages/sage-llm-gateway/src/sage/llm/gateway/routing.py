"""From the model that a request names to the engine that answers it."""

import asyncio
import time

from starlette.requests import ClientDisconnect, Request

from sage.common.errors import NotFound, Overloaded
from sage.llm.client.types import EngineKind, EngineState
from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.store.store import EngineRecord

_POLL_SECONDS = 0.1


async def running_engine(manager: ControlPlaneManager, model: str, kind: EngineKind, request: Request) -> EngineRecord:
    """Return the running engine for a model; if it is starting, wait for it as long as the settings say.

    Raises NotFound if none serves it, Overloaded if it is not ready in time or ends first, ClientDisconnect.
    """
    deadline = time.monotonic() + request.app.state.settings.request_wait_seconds
    engine = await manager.find_engine(model, kind)
    while engine.state is not EngineState.RUNNING:
        if time.monotonic() > deadline:
            raise Overloaded(code="engine_starting", message=f"{engine.id} for '{model}' is still {engine.state}.",
                             hint="Try again in some seconds.")  # fmt: skip
        if await request.is_disconnected():
            raise ClientDisconnect
        await asyncio.sleep(_POLL_SECONDS)
        try:
            engine = await manager.find_engine(engine.id, kind)
        except NotFound:
            ended = await manager.get_engine(engine.id)
            why = f": {ended.reason.message}" if ended.reason else ""
            raise Overloaded(code="engine_ended", message=f"{ended.id} for '{model}' is {ended.state}{why}",
                             hint=f"`sage llm engine resume {ended.id}` starts it again.") from None  # fmt: skip
    return engine
